#!/usr/bin/env python3
"""Encoding of CCQ's stream layout: weights per second of the compiled search and of PyTorch's, and the squared error.

Both searches run in the same process on the same normally distributed weights; the figures are the best of three rounds.

    python benchmarks/bench_stream.py --out benchmarks/results/stream_encoder.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hf_pcdvq_kernels.formats.stream import STREAM_BITS, STREAM_RING
from rich.console import Console
from rich.table import Table

from hf_pcdvq.codecs import viterbi
from hf_pcdvq.codecs.stream import DEVIATION, StreamCodec
from hf_pcdvq.codecs.viterbi import numba as viterbi_numba
from hf_pcdvq.codecs.viterbi import reference

CASES = [*((bits, 12) for bits in STREAM_BITS), (2.0, 14), (2.0, 16)]
ROWS, COLUMNS = 4 * STREAM_RING, 1024  # a million weights for the squared error
ROUNDS = 3


def best_time(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(bits: float, window: int, weight: torch.Tensor, share: int) -> dict[str, Any]:
    """One setting; the reference search is slow and gets only every `share`-th column."""
    codec = StreamCodec(0, 0, bits, window)
    encoder = codec.unit_encoder(weight)
    targets = (weight / (encoder.scale[:, None] * DEVIATION)).T.contiguous()
    arguments = torch.ones(len(weight)), encoder.values / DEVIATION, codec.layout
    few = targets[::share].contiguous()
    viterbi_numba.search(few, *arguments, viterbi.OVERLAP)  # compiles
    compiled = targets.numel() / best_time(lambda: viterbi_numba.search(targets, *arguments, viterbi.OVERLAP))
    plain = few.numel() / best_time(lambda: reference.search(few, *arguments))
    return {
        "bits": bits,
        "window": window,
        "squared_error": codec.relative_error(weight, codec.encode(weight)),
        "weights_per_second_numba": round(compiled),
        "weights_per_second_reference": round(plain),
        "ratio": round(compiled / plain, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    table = Table("bits", "window", "squared error", "weights/s, Numba", "weights/s, PyTorch", "ratio")
    rows = []
    for bits, window in CASES:
        rows.append(measure(bits, window, weight, 64 << (window - 12)))
        row = rows[-1]
        speeds = (f"{row[f'weights_per_second_{name}']:,}" for name in ("numba", "reference"))
        table.add_row(str(bits), str(window), f"{row['squared_error']:.5f}", *speeds, f"{row['ratio']:.1f}")
    Console().print(table)
    if args.out:
        content = {
            "command": "python benchmarks/bench_stream.py",
            "machine": f"{platform.machine()}, {args.threads} threads",
            "versions": {"torch": torch.__version__, "numba": version("numba")},
            "weights": weight.numel(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
