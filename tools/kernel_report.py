#!/usr/bin/env python3
"""Compile every Triton kernel and report registers, spills, shared memory and instructions per decoded weight.

For an H100 (sm_90) it also says how long a product of one layer takes at least, by what the device issues and reads in a second, and which of
the two is the bound. Latency comes on top: docs/gpu.md has what was measured.

Needs no GPU. Every kernel is compiled with its default launch config for a layer of 8192 x 8192 on an H100. The first run
takes some twenty minutes on two cores; Triton caches compiled kernels, so an interrupted run can be resumed.

    python tools/kernel_report.py --json benchmarks/results/kernel_report.json
    python tools/kernel_report.py --target sm_90 --kernel "stream-2.0" --kernel rotation
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from hf_pcdvq_kernels.formats import FORMATS
from hf_pcdvq_kernels.triton import compiled
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# An H100 SXM: 132 multiprocessors issue for 128 lanes at 1.98 GHz; its memory is read at 3.35 TB/s.
H100, LANE_INSTRUCTIONS, BYTES = "sm_90", 132 * 128 * 1.98e9, 3.35e12


def chosen(parts: list[str]) -> list[str]:
    """Names of the kernels that contain one of `parts`, or all names if it is empty; exits if there is no such kernel."""
    names = [name for name in compiled.variants() if not parts or any(part in name for part in parts)]
    if not names:
        raise SystemExit(f"no kernel has a name like {parts}; there are: {'; '.join(compiled.variants())}")
    return names


def report(names: list[str], targets: list[str], jobs: int) -> list[dict[str, Any]]:
    """One row per kernel and target, in the order of the arguments."""
    pairs = [(name, target) for name in names for target in targets]
    figures = {}
    with tqdm(total=len(pairs), unit="kernel") as bar:
        for pair, result in compiled.measure_all(pairs, jobs):
            figures[pair] = asdict(result)
            bar.update()
    warps = {name: compiled.variants()[name].warps for name in names}
    rows = [{"kernel": pair[0], "target": pair[1], "warps": warps[pair[0]], **figures[pair]} for pair in pairs]
    return [{**row, **prediction(row)} for row in rows]


def prediction(row: dict[str, Any]) -> dict[str, Any]:
    """The least time of a product with the layer of the report, and its bound; empty for other kernels and devices."""
    name = row["kernel"].split(",")[0]
    if row["target"] != H100 or row["instructions"] is None or name not in FORMATS:
        return {}
    weights = compiled.ROWS * compiled.COLUMNS
    specs = FORMATS[name].specs(name, compiled.ROWS, compiled.COLUMNS).values()
    read = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
    seconds = {"instructions": row["instructions"] * weights / LANE_INSTRUCTIONS, "memory": read / BYTES}
    bound = max(seconds, key=seconds.__getitem__)
    return {
        "least_microseconds": seconds[bound] * 1e6,
        "bound": bound,
        "most_times_bf16": 2 * weights / BYTES / seconds[bound],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table, spills in red."""
    made = Table("kernel", title="instructions: SASS instructions per decoded weight in the main loop")
    for name in (
        "target",
        "warps",
        "registers",
        "spills",
        "shared bytes",
        "instructions",
        "least µs",
        "times bf16, at most",
    ):
        made.add_column(name, justify="right")
    for row in rows:
        count = "" if row["instructions"] is None else f"{row['instructions']:.2f}"
        spills = f"[red]{row['spills']}[/]" if row["spills"] else "0"
        least = [""] * 2
        if "bound" in row:
            least = [f"{row['least_microseconds']:.1f} ({row['bound']})", f"{row['most_times_bf16']:.1f}"]
        values = (row["target"], row["warps"], row["registers"], spills, row["shared"], count, *least)
        made.add_row(row["kernel"], *map(str, values))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", action="append", choices=list(compiled.TARGETS), help="may be repeated; default: all"
    )
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="TEXT", help="only kernels with this in their name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes for compiling (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    rows = report(chosen(args.kernel), args.target or list(compiled.TARGETS), args.jobs)
    Console(width=150).print(table(rows))
    if args.json is not None:
        content = {
            "command": "python tools/kernel_report.py",
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            "layer": [compiled.ROWS, compiled.COLUMNS],
            "units": {
                "spills": "bytes per thread on NVIDIA, vector registers on AMD",
                "shared": "bytes per thread block",
                "instructions": "SASS instructions per decoded weight in the main loop of a thread",
                "most_times_bf16": "against bf16 weights that are read at the rate of the memory",
            },
            "rows": rows,
        }
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.json)


if __name__ == "__main__":
    main()
