"""Calibrated quantization of a few blocks of Llama-3-8B's size, with random weights: the seconds that a block takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_pcdvq
from hf_pcdvq.calibration.settings import Calibration
from hf_pcdvq.config import config_of_setting

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from bench_generate import llama_3_8b  # noqa: E402
from random_models import tiny  # noqa: E402

SETTINGS = ("pcdvq-2.25", "stream-2.0")
BLOCKS = 2  # measured; the first of a process also compiles
WHOLE = 32  # blocks of the model


def quantized(config: LlamaConfig, setting: str, device: str, windows: int, length: int) -> list[float]:
    """Seconds for each block."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(config.vocab_size, (windows, length))
    made = config_of_setting(setting)
    made.calibration = Calibration(samples=windows, length=length, holdout=0)
    hf_pcdvq.quantize_model(model, None, made, tokens, progress=False)
    return [block.seconds for block in model.hf_quantizer.report.blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    defaults = Calibration()
    device, config, windows, length = "cuda", llama_3_8b(), defaults.samples, defaults.length
    config.num_hidden_layers, config.vocab_size = BLOCKS, 1024
    settings = SETTINGS
    if args.dry_run:
        device, config, windows, length, settings = "cpu", tiny(), 2, 32, SETTINGS[:1]
        hf_pcdvq.set_backend("reference")
    rows = []
    for setting in settings:
        seconds = quantized(config, setting, device, windows, length)
        row = {"setting": setting, "windows": windows, "length": length, "seconds of blocks": seconds}
        rows.append({**row, "seconds of 8B": WHOLE * seconds[-1]})
        (args.out / "blocks.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(rows[-1], dataclasses.asdict(defaults), flush=True)


if __name__ == "__main__":
    main()
