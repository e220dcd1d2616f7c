#!/usr/bin/env python3
"""Tokens per second of a whole model, in bf16 and packed: greedy decoding, batch size 1, static cache.

The model has the shape of Llama-3-8B and random weights; the packed layers hold random codes, since speed does not depend
on them. On a GPU Transformers compiles both. Everything is measured in one process, bf16 first.

    python benchmarks/bench_generate.py
    python benchmarks/bench_generate.py --settings pcdvq-2.25 stream-2.0 --config path/to/config.json

Needs transformers>=5.23. For a machine without a network, run `pip download --no-deps -d wheels transformers` elsewhere
(for the platform and Python version of that machine), copy the folder, and run there
`pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site:.:kernels/torch-ext`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_options import add_options, settle
from random_models import dense_model, packed_model, tiny
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

import hf_pcdvq
from hf_pcdvq.config import SETTINGS
from hf_pcdvq.evaluation.speed import measure_speed
from hf_pcdvq.files.records import package_versions, write_text
from hf_pcdvq.files.size import readable_size

CHOICES = [name for name, (codec, _) in SETTINGS.items() if codec.method is not None]
DEFAULT = ("pcdvq-2.0", "pcdvq-2.25", "ccq-2.5", "stream-2.0")
TARGET = 2.5  # times as fast as bf16


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def measure(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Speed and size of a model."""
    speed = measure_speed(model, args.prompt_tokens, args.new_tokens, args.runs, cache_implementation="static")
    return {**asdict(speed), "model_bytes": model.get_memory_footprint()}


def free(device: torch.device) -> None:
    """Release the memory of a deleted model, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("setting", title=f"greedy generation on {rows[0]['device']}, static cache", title_justify="left")
    for name in ("tokens per second", "times bf16", "model", "peak memory"):
        made.add_column(name, justify="right")
    for row in rows:
        peak = "" if row["peak_memory_bytes"] is None else readable_size(row["peak_memory_bytes"])
        speed = f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}"
        made.add_row(row["setting"], *speed, readable_size(row["model_bytes"]), peak)
    return made


def write(file: Path, config: PreTrainedConfig, rows: list[dict[str, Any]]) -> None:
    fields = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    content = {
        "format": 1,
        "command": "python benchmarks/bench_generate.py",
        "versions": package_versions(),
        "model": {name: getattr(config, name, None) for name in fields},
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", choices=CHOICES, default=DEFAULT, metavar="NAME", help=", ".join(CHOICES)
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of a model (default: Llama-3-8B's)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="runs; the median counts (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    settle(parser, args, "-generate", needs_gpu=True)
    if args.config is not None and not args.config.is_file():
        parser.error(f"--config {args.config}: there is no such file")
    return args


def main() -> None:
    args = arguments()
    hf_pcdvq.set_backend("auto" if args.device.type == "cpu" else "triton")  # a missing kernel is an error here
    config = tiny() if args.smoke else llama_3_8b()
    if args.config is not None:
        config = AutoConfig.from_pretrained(args.config)
    rows: list[dict[str, Any]] = []
    for setting in ("bf16", *args.settings):
        print(f"{setting}: making the model", file=sys.stderr, flush=True)
        if setting == "bf16":
            model = dense_model(config, args.device)
        else:
            model = packed_model(config, setting, args.device)
        row = measure(model, args)
        ratio = row["tokens_per_second"] / (rows[0] if rows else row)["tokens_per_second"]
        rows.append({"setting": setting, "ratio": ratio, **row})
        write(args.out, config, rows)
        del model
        free(args.device)
    Console(width=100).print(table(rows))
    met = [row["setting"] for row in rows if row["ratio"] >= TARGET]
    print(f"target: {TARGET} times as fast as bf16; met by {', '.join(met) or 'none'}; written to {args.out}")


if __name__ == "__main__":
    main()
