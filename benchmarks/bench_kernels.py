#!/usr/bin/env python3
"""Speed of products with packed weights on a GPU, against bf16 and other projects, at layer sizes of large models.

For every layer, number of tokens and kind of weight: time per call in a CUDA graph, including the rotation of the
activations, with weights that are read from memory and not from a cache; bf16 is measured in the same process. Ends with
a table and the performance targets, and draws a plot next to the output file if matplotlib is installed.

Needs only PyTorch and Triton. Takes some minutes, most of them for compiling. The file is written after each group (one
layer with one number of tokens); groups in the file are not measured again, so an interrupted run can be resumed.

    PYTHONPATH=kernels/torch-ext python benchmarks/bench_kernels.py
    PYTHONPATH=kernels/torch-ext python benchmarks/bench_kernels.py --models Llama-3-70B --tokens 1 8 --formats "ccq-2.5"
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import hf_pcdvq_kernels as ops
import torch
import triton
from bench_options import add_options, settle
from bench_peers import PEERS, Product
from bench_results import (
    DENSE,
    LAYERS,
    SMOKE_LAYERS,
    Layer,
    Results,
    Row,
    check_setup,
    own_rows,
    plot,
    table,
    target_lines,
)
from hf_pcdvq_kernels.random_weights import random_packed
from hf_pcdvq_kernels.triton import timing, tuned
from torch.nn.functional import linear

FORMATS = ("pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "stream-2.0")
TOKENS = (1, 2, 4, 8, 16, 64, 2048)
SMOKE_TOKENS = (1, 4)
ROTATION = 128  # the largest block of the rotation, as configs have it by default


def dense(outputs: int, inputs: int, seed: int, device: torch.device) -> Product:
    """The product that all others are compared with."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, device=device, dtype=torch.bfloat16)
    return Product(partial(linear, weight=weight), weight.nbytes)


def packed(format: str, outputs: int, inputs: int, seed: int, device: torch.device) -> Product:
    """A product of ours, called as the layers of a model call it."""
    weight = random_packed(format, outputs, inputs, seed, device)
    signs = torch.ones(min(ROTATION, inputs & -inputs), device=device)
    nbytes = sum(tensor.nbytes for tensor in weight if isinstance(tensor, torch.Tensor))
    family = ops.family_of(format).family
    return Product(lambda x: ops.matmul(family, x, weight, signs=signs), nbytes)


def maker(weight: str) -> Callable[[int, int, int, torch.device], Product]:
    """The function that creates products with this kind of weight."""
    if weight == DENSE:
        return dense
    return PEERS[weight] if weight in PEERS else partial(packed, weight)


def activations(tokens: int, inputs: int, device: torch.device) -> torch.Tensor:
    return torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)


def usable_peers(names: list[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The names of other projects that run here, and for the rest the error."""
    usable, errors = [], {}
    for name in names:
        try:
            PEERS[name](128, 128, 0, device).run(activations(1, 128, device))
            usable.append(name)
        except Exception as error:  # whatever it is, it is reported, and our own products are still measured
            errors[name] = f"{type(error).__name__}: {error}"
    return usable, errors


def setup(device: torch.device, smoke: bool) -> dict[str, str]:
    """What figures depend on besides the product: device, versions, hashes of the kernels and the launch configs."""
    source = Path(ops.__file__).parent
    files = sorted(source.rglob("*.py"))
    configs = sorted((str(shape), str(found.config)) for shape, found in tuned.load(device).items())
    return {
        "device": tuned.device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": digest(
            b"".join(file.relative_to(source).as_posix().encode() + file.read_bytes() for file in files)
        ),
        "launch configs": digest(repr(configs).encode()) if configs else "default",
        "run": "smoke" if smoke else "full",
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def opened(file: Path, device: torch.device, smoke: bool) -> Results:
    """The results in a file, or empty ones if it does not exist.

    Raises:
        ValueError: the file is not one of results, or was measured on another device or with other versions or kernels.
    """
    here = setup(device, smoke)
    if not file.is_file():
        return Results(here, timing.copy_rate(device, 1 << 20 if smoke else timing.COPIED))
    results = Results.read(file)
    check_setup(file, results.setup, here)
    return results


def unmeasured(
    results: Results, layers: Iterable[Layer], tokens: Iterable[int], wanted: Iterable[str]
) -> Iterator[tuple[Layer, int]]:
    """Yields the groups for which some of the wanted weights have not been measured."""
    for layer in layers:
        yield from ((layer, number) for number in tokens if not set(wanted) <= set(results.times(layer, number)))


def compile_all(groups: list[tuple[Layer, int]], formats: list[str], device: torch.device, jobs: int) -> None:
    """Run every product once, in several processes, so that Triton keeps all kernels before one of them is timed."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        tasks = {}
        for layer, tokens in groups:
            for format in formats:
                task = pool.submit(run_once, format, layer.outputs, layer.inputs, tokens, device)
                tasks[task] = f"{format}, {layer.outputs} x {layer.inputs}, {tokens} tokens"
        try:
            for number, task in enumerate(as_completed(tasks), 1):
                error = task.result()
                if error is not None:  # measuring it will fail as well, and record the error
                    print(f"cannot run {tasks[task]}: {error}", flush=True)
                if number % 50 == 0 or number == len(tasks):
                    print(f"compiled {number} of {len(tasks)} products", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def run_once(format: str, outputs: int, inputs: int, tokens: int, device: torch.device) -> str | None:
    """Run a product; returns its error, if any, as text: not every exception can be passed between processes."""
    choose_backend(device)
    try:  # .item() waits for the device, so its errors are raised here
        packed(format, outputs, inputs, 0, device).run(activations(tokens, inputs, device)).sum().item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def choose_backend(device: torch.device) -> None:
    """On a GPU, missing kernels are an error: a fallback must not be measured in their place."""
    ops.set_backend("auto" if device.type == "cpu" else "triton")


class Weights:
    """The weights of one layer, of every kind as many as do not fit into a cache, made when they are first asked for."""

    def __init__(self, layer: Layer, device: torch.device, smoke: bool):
        self.layer, self.device, self.smoke = layer, device, smoke
        self._products: dict[str, list[Product]] = {}

    def __getitem__(self, weight: str) -> list[Product]:
        if weight not in self._products:
            make = partial(maker(weight), self.layer.outputs, self.layer.inputs, device=self.device)
            first = make(seed=0)
            copies = 2 if self.smoke else timing.copies(first.nbytes)
            self._products[weight] = [first, *(make(seed=seed) for seed in range(1, copies))]
        return self._products[weight]


def measure(weights: Weights, tokens: int, names: list[str], copy_rate: float) -> list[Row]:
    """The rows of a group, bf16 first."""
    x = activations(tokens, weights.layer.inputs, weights.device)
    rows: list[Row] = []
    for name in names:
        row = partial(Row, *weights.layer, tokens, name)
        try:
            products = weights[name]
            seconds = timing.seconds_per_call([partial(product.run, x) for product in products], weights.device)
        except Exception as error:  # recorded in the file and the table; the others are still measured
            if name == DENSE:
                raise
            rows.append(row(error=f"{type(error).__name__}: {error}"))
            continue
        nbytes, rate = products[0].nbytes, products[0].nbytes / seconds
        ratio = (rows[0].seconds if rows else seconds) / seconds
        rows.append(row(nbytes, seconds, ratio, rate, rate / copy_rate))
    return rows


def measure_all(
    results: Results, groups: list[tuple[Layer, int]], wanted: list[str], args: argparse.Namespace
) -> None:
    """Measure groups, and write the file after each."""
    weights = None
    for number, (layer, tokens) in enumerate(groups, 1):
        if weights is None or weights.layer != layer:
            weights = Weights(layer, args.device, args.smoke)
        # Rows of this group from an earlier run are measured again: all ratios must be to the same bf16 run.
        names = list({**dict.fromkeys(wanted), **results.times(layer, tokens)})  # bf16 is the first that is wanted
        rows = measure(weights, tokens, names, results.copy_rate)
        results.replace(rows)
        results.write(args.out)
        ratios = (f"{row.weight} {f'failed: {row.error}' if row.error else f'{row.ratio:.2f}'}" for row in rows[1:])
        print(
            f"[{number}/{len(groups)}] {layer.model} {layer.name}, {tokens} tokens: bf16 {rows[0].seconds * 1e6:.1f} µs; "
            f"times as fast: {', '.join(ratios)}",
            flush=True,
        )


def show(results: Results, file: Path) -> None:
    """Print the table and draw the plot."""
    print("\n" + table(results) + "\n\n" + target_lines(results))
    picture = file.with_suffix(".png")
    if not results.rows:
        print("no plot: nothing was measured")
    elif importlib.util.find_spec("matplotlib") is None:
        print(
            f"no plot: matplotlib is not installed. Where it is: python benchmarks/bench_kernels.py --plot-only --out {file}"
        )
    else:
        plot(results, picture)
        print(f"plot: {picture}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(dict.fromkeys(layer.model for layer in LAYERS))
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME", help=", ".join(models))
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="NAME", help=", ".join(FORMATS)
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="NAME", help=f"{', '.join(PEERS)}; or none"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes for compiling (default: one per core, up to 16; 0: compile while measuring)",
    )
    parser.add_argument(
        "--plot-only", action="store_true", help="print and plot what is in the file, measure nothing"
    )
    args = parser.parse_args()
    settle(parser, args, "", needs_gpu=not args.plot_only)
    args.tokens = args.tokens or (SMOKE_TOKENS if args.smoke else TOKENS)
    if min(args.tokens) < 1:
        parser.error(f"--tokens must be positive, got {min(args.tokens)}")
    if args.jobs is None:
        args.jobs = 0 if args.device.type == "cpu" else min(os.cpu_count(), 16)
    return args


@torch.inference_mode()
def run(results: Results, args: argparse.Namespace) -> None:
    """Measure what is missing in the results."""
    choose_backend(args.device)
    peers, results.unavailable = usable_peers(args.peers, args.device)
    layers = SMOKE_LAYERS if args.smoke else [layer for layer in LAYERS if layer.model in args.models]
    wanted = [DENSE, *args.formats, *peers]
    groups = list(unmeasured(results, layers, args.tokens, wanted))
    print(f"{len(groups)} layers and numbers of tokens to measure, into {args.out}", flush=True)
    if groups and args.jobs:
        compile_all(groups, args.formats, args.device, args.jobs)
    measure_all(results, groups, wanted, args)


def main() -> None:
    args = arguments()
    try:
        results = Results.read(args.out) if args.plot_only else opened(args.out, args.device, args.smoke)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if not args.plot_only:
        try:
            run(results, args)
        except KeyboardInterrupt:
            sys.exit(f"\nstopped; {args.out} keeps what was measured, and the same command continues from there")
    show(results, args.out)
    failed = [row for row in own_rows(results.rows) if row.error is not None]
    if failed:
        sys.exit(f"{len(failed)} products of ours failed, see above")


if __name__ == "__main__":
    main()
