"""What benchmarks/bench_kernels.py and benchmarks/bench_generate.py ask alike: where to run, and where to write."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hf_pcdvq_kernels.triton import tuned

RESULTS = Path(__file__).resolve().parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --device, --out and --smoke."""
    parser.add_argument("--device", type=torch.device, help="cuda, cuda:1, xpu, ... (default: the accelerator)")
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for it (default: benchmarks/results)")
    parser.add_argument("--smoke", action="store_true", help="tiny and on the CPU, to see that it works; needs --out")


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace, ending: str, needs_gpu: bool) -> None:
    """Fill in `device` and `out`, whose file is called like the device, and refuse what cannot be."""
    if args.device is None:
        has_gpu = torch.accelerator.is_available() and not args.smoke
        args.device = torch.accelerator.current_accelerator() if has_gpu else torch.device("cpu")
    if args.device.type == "cpu" and needs_gpu and not args.smoke:
        parser.error("this measures a GPU, and the device is the CPU; --smoke runs something tiny there")
    if args.out is None and args.smoke:
        parser.error("--smoke needs --out: its figures mean nothing")
    args.out = args.out or RESULTS
    if args.out.is_dir():
        args.out /= f"{tuned.file_of(args.device).stem}{ending}.json"
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
