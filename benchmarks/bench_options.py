"""Options that benchmarks/bench_kernels.py and benchmarks/bench_generate.py share: where to run, and where to write."""

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
    parser.add_argument("--smoke", action="store_true", help="a tiny test run on the CPU; needs --out")


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace, ending: str, needs_gpu: bool) -> None:
    """Fill in `args.device` and `args.out`, whose file is named after the device; exit if they cannot work.

    Args:
        parser: reports the error.
        args: the parsed arguments, which are changed.
        ending: follows the device's name in the file name.
        needs_gpu: whether to refuse the CPU.
    """
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
