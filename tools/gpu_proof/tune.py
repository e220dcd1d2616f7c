"""Measures launch configs for the layers of Llama-3-8B and 70B: the file that ships with the package for this device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hf_pcdvq_kernels.triton import launch_config, timing, tuned, tuning
from hf_pcdvq_kernels.triton.launch_config import Shape

FORMATS = ("pcdvq-2.25", "ccq-2.5", "stream-2.0")
TOKENS = (1, 8, 16, 64)
SIZES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (1024, 8192),
    (28672, 8192),
    (8192, 28672),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        timing.COLD, timing.REPLAYS = 1, 1
        shape = Shape("pcdvq-2.25", 1, 8, 1024)
        print(shape, tuning.measure(shape, torch.device("cpu")))
        return
    device = torch.accelerator.current_accelerator()
    shapes = [Shape(name, tokens, *size) for tokens in TOKENS for name in FORMATS for size in SIZES]
    wanted = [shape for shape in shapes if shape not in tuned.measured(device)]
    for shape, found in tuning.tune(wanted, device):
        default = launch_config.default(shape, launch_config.processors(device))
        gain = found.default_seconds / found.seconds
        print(f"{shape}: {found.config}, {found.seconds * 1e6:.1f} µs, {gain:.2f} times {default}", flush=True)
    print(tuned.file_of(device))


if __name__ == "__main__":
    main()
