#!/usr/bin/env python3
"""Search the multiplier of the hash in CCQ's stream layout.

Random odd 32-bit multipliers are compared by the squared error of the best rings on standard normal weights: first at 2
bits with windows of 12, then the best of them at every rate and with the largest windows, by the geometric mean over all
of these. The result of seed 1 is used in `hf_pcdvq_kernels.formats.stream`.

    python tools/search_stream_hash.py            # two minutes on two cores; use it with Numba installed
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from hf_pcdvq_kernels.formats.stream import STREAM_RING, stream_layout
from hf_pcdvq_kernels.reference.stream import values
from tqdm import tqdm

from hf_pcdvq.codecs import viterbi
from hf_pcdvq.codecs.stream import DEVIATION

# Bits per weight, bits per window, number of rings.
ALL = ((2.0, 12, 400), (2.5, 12, 200), (3.0, 12, 200), (4.0, 12, 200), (2.0, 16, 40))
SCREEN = (2.0, 12, 200)
# Standard deviations that the values are scaled to: which one is better depends on the rate and the multiplier.
SPREADS = (0.95, 1.0)


def squared_error(multiplier: int, bits: float, window: int, rings: int) -> float:
    """Mean squared error on standard normal weights, with the better of two scales."""
    targets = torch.randn(rings, STREAM_RING, generator=torch.Generator().manual_seed(rings))
    errors = []
    for spread in SPREADS:
        table = values(window, torch.device("cpu"), multiplier).float() * (spread / DEVIATION)
        found = viterbi.search(targets, torch.ones(STREAM_RING), table, stream_layout(bits, window))
        errors.append((table[found.long()] - targets).square().mean().item())
    return min(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=250, help="multipliers to try (default: %(default)s)")
    parser.add_argument(
        "--keep", type=int, default=80, help="how many of them to compare at all rates (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--show", type=int, default=8, help="multipliers to print (default: %(default)s)")
    args = parser.parse_args()
    drawn = np.random.default_rng(args.seed).integers(1 << 31, 1 << 32, args.count)
    candidates = {int(number) | 1 for number in drawn}
    screened = sorted(
        (squared_error(number, *SCREEN), number) for number in tqdm(sorted(candidates), desc="screening")
    )
    rows = []
    for _, number in tqdm(screened[: args.keep], desc="comparing"):
        errors = [squared_error(number, *case) for case in ALL]
        rows.append((math.exp(sum(map(math.log, errors)) / len(errors)), number, errors))
    print("multiplier   mean     " + "  ".join(f"{bits} bits, {window}" for bits, window, _ in ALL))
    for mean, number, errors in sorted(rows)[: args.show]:
        print(f"{number:#010x}  {mean:.5f}  " + "  ".join(f"{error:12.5f}" for error in errors))


if __name__ == "__main__":
    main()
