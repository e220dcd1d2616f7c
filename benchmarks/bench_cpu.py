#!/usr/bin/env python3
"""Speed of packed models on a CPU, against bf16 and llama.cpp; memory, and what quantized activations cost.

Parts: `layer`, single layers with 1, 8 and 512 tokens, weights cold in cache; `overhead`, a call of a tiny layer;
`numba`, the same products as Numba functions; `generate`, 32 tokens after a prompt of 16; `prefill`, 512 tokens; `llama`, generation with llama.cpp; `memory`; and
`quality`, KL divergence. Whatever is compared runs alternately in one process (llama.cpp: in a process that waits
meanwhile); ratios are medians over the rounds. Models other than SmolLM2-135M have random weights.

The file is written after every row; rows in it are not measured again, so an interrupted run can be resumed. Nothing
else should run on the machine.

    python benchmarks/bench_cpu.py --threads 2                        # everything, about half an hour
    python benchmarks/bench_cpu.py --threads 1 --parts layer
    python benchmarks/bench_cpu.py --threads 2 --instructions avx2 --parts generate --models 3B
    python benchmarks/bench_cpu.py --table                            # prints and plots what is there

With `--instructions avx2` PyTorch, too, is kept from using more than AVX2.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu_llama
import cpu_memory
import cpu_models
import cpu_numba
import hf_pcdvq_kernels
import torch
from cpu_results import DENSE, LARGEST, PLAIN, SMALL, Results, line, markdown, table
from cpu_results import plot as plot_results
from cpu_timing import Call, alternated, compared, repeated, timed
from hf_pcdvq_kernels.cpu import launch
from hf_pcdvq_kernels.cpu.library import Library, load
from hf_pcdvq_kernels.random_weights import random_weight
from rich.console import Console
from texts import add_text_options, texts_of
from transformers.utils.logging import disable_progress_bar

import hf_pcdvq
from hf_pcdvq.files.records import cpu_name, package_versions

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("layer", "overhead", "numba", "generate", "prefill", "llama", "memory", "quality")
FORMATS = ("pcdvq-2.25", "pcdvq-2.0", "stream-2.0", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "int8")
SIZES = ((4096, 4096), (14336, 4096), (4096, 14336))  # outputs, inputs
TOKENS = (1, 8, 512)
MODELS = {
    SMALL: ("pcdvq-2.25", "stream-2.0", "ccq-2.5", f"pcdvq-2.25{cpu_models.HEAD}"),
    "1.1B": ("pcdvq-2.25", "pcdvq-2.0", "stream-2.0", "ccq-2.5", f"pcdvq-2.25{cpu_models.HEAD}"),
    LARGEST: ("pcdvq-2.25", "stream-2.0", f"pcdvq-2.25{cpu_models.HEAD}"),
}
MIDDLE = "1.1B"  # the model of the parts prefill, llama and memory
NEW, PREFILL = 32, 512  # tokens
# Extensions of a CPU that decide which kernels run, here and in PyTorch.
FLAGS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi2",
    "avx512_bf16",
    "amx_bf16",
    "asimddp",
    "bf16",
)
MASKED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


class Bench:
    """What to measure, and the file for it."""

    def __init__(self, results: Results, args: argparse.Namespace):
        self.results, self.args = results, args
        self.with_ = {"threads": args.threads, "instructions": args.instructions}

    def missing(self, **about: Any) -> bool:
        return not self.results.has(**self.with_, **about)

    def add(self, **row: Any) -> None:
        self.results.add(self.with_ | row)

    # ----------------------------------------------------------------------------------------------- layers

    def layer(self) -> None:
        for outputs, inputs in self.args.sizes:
            about = {"part": "layer", "layer": f"{outputs} x {inputs}"}
            for tokens in self.args.tokens:
                with_plain = tokens == 1 and self.args.instructions != "avx2"  # known to be slow, or bf16 itself
                kinds = (*FORMATS, PLAIN) if with_plain else FORMATS
                kinds = [kind for kind in kinds if self.missing(**about, tokens=tokens, weight=kind)]
                if kinds:
                    times = alternated(layer_runs(outputs, inputs, tokens, kinds, self.args.cache), self.args.rounds)
                    for kind in kinds:
                        self.add(**about, tokens=tokens, weight=kind, **compared(times, kind, DENSE))

    def numba(self) -> None:
        for outputs, inputs in self.args.numba_sizes:
            for kind in cpu_numba.PRODUCTS:
                about = {"part": "numba", "layer": f"{outputs} x {inputs}", "tokens": 1, "weight": kind}
                if self.missing(**about):
                    runs = numba_runs(kind, outputs, inputs, self.args.threads, self.args.cache)
                    times = alternated(runs, self.args.rounds)
                    fastest = min((name for name in times if name != kind), key=lambda name: min(times[name]))
                    every = {name: min(seconds) for name, seconds in times.items()}
                    self.add(**about, **compared(times, kind, fastest), best_seconds_of_each=every)

    def overhead(self) -> None:
        about = {"part": "overhead", "layer": "128 x 128", "tokens": 1, "weight": "pcdvq-2.25"}
        if self.missing(**about):
            x = torch.randn(1, 128, dtype=torch.bfloat16)
            layers = {
                "packed": cpu_models.packed_layer("pcdvq-2.25", 128, 128),
                DENSE: cpu_models.dense_layer(128, 128),
            }
            calls = {name: repeated([partial(layer, x)]) for name, layer in layers.items()}
            self.add(**about, **compared(alternated(calls, self.args.rounds), "packed", DENSE))

    # ----------------------------------------------------------------------------------------------- models

    def generate(self) -> None:
        for name in self.args.models:
            self._models(
                "generate",
                name,
                MODELS.get(name, ("pcdvq-2.25",)),
                partial(cpu_models.generation, NEW),
                new_tokens=NEW,
            )

    def prefill(self) -> None:
        call = partial(cpu_models.reading, self.args.prefill)
        self._models("prefill", self.args.middle, ("pcdvq-2.25", "stream-2.0"), call)

    def _models(
        self, part: str, name: str, settings: tuple[str, ...], call: Callable[..., Call], **extra: Any
    ) -> None:
        """Packed forms of a model, one after the other, each alternately with bf16."""
        about = {"part": part, "model": name}
        wanted = [setting for setting in settings if self.missing(**about, weight=setting)]
        if not wanted:
            return
        print(f"making {name} in bf16", flush=True)
        dense = cpu_models.dense_of(name, self.args.work)
        for setting in wanted:
            packed = cpu_models.packed_of(name, self.args.work, setting, dense)
            calls = {setting: timed(call(packed)), DENSE: timed(call(dense))}
            times = alternated(calls, self.args.rounds_of_models)
            bytes_of = {"packed_bytes": packed.get_memory_footprint(), "dense_bytes": dense.get_memory_footprint()}
            self.add(**about, weight=setting, **extra, **compared(times, setting, DENSE), **bytes_of)
            del packed, calls
            gc.collect()

    def llama(self) -> None:
        name, work = self.args.middle, self.args.work
        wanted = [
            kind
            for kind in cpu_llama.TYPES
            if self.missing(part="llama", model=name, weight=f"pcdvq-2.25 and {kind}")
        ]
        if not wanted:
            return
        packed = cpu_models.packed_of(name, work, "pcdvq-2.25", cpu_models.dense_of(name, work))
        gc.collect()
        for kind in wanted:
            file = work / f"{name}-{kind}.gguf"
            if not file.is_file():
                print(f"writing {file.name}", flush=True)
                cpu_llama.write_gguf(file, cpu_models.SHAPES[name](), kind)
            with cpu_llama.running(work, file, self.args.threads, cpu_models.PROMPT, NEW) as llama:
                calls = {"packed": timed(cpu_models.generation(NEW, packed)), "llama.cpp": llama}
                times = alternated(calls, self.args.rounds_of_models)
            row = {"peer": cpu_llama.version(work), "peer_bytes": file.stat().st_size, "new_tokens": NEW}
            row |= compared(times, "packed", "llama.cpp")
            self.add(part="llama", model=name, weight=f"pcdvq-2.25 and {kind}", **row)

    def memory(self) -> None:
        about = {"part": "memory", "model": self.args.middle, "weight": "pcdvq-2.25"}
        if self.missing(**about):
            folder = cpu_models.random_folder(self.args.work, self.args.middle, "pcdvq-2.25")
            self.add(**about, **cpu_memory.in_new_process(folder, self.args.threads))

    def quality(self) -> None:
        for setting in ("pcdvq-2.25", "int8"):  # rounded to int8, the model is as good as before
            about = {"part": "quality", "model": SMALL, "weight": setting}
            if self.missing(**about):
                texts, size = self.args.texts, (self.args.windows, self.args.length)
                self.add(**about, **cpu_models.activation_quality(self.args.work, setting, texts, *size))


def layer_runs(
    outputs: int, inputs: int, tokens: int, kinds: list[str], cache: int
) -> dict[str, Callable[[], float]]:
    """What is timed of a layer, by kind of weight: bf16 and the kinds given. `cache`: bytes between two uses of a weight."""
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
    dense = cpu_models.copies(cpu_models.dense_layer(outputs, inputs), cache)
    runs = {DENSE: repeated([partial(layer, x) for layer in dense])}
    for kind in kinds:
        if kind == PLAIN:
            runs[kind] = repeated([partial(cpu_models.without_onednn, layer, x) for layer in dense])
        else:
            layers = cpu_models.copies(cpu_models.packed_layer(kind, outputs, inputs), cache)
            runs[kind] = repeated([partial(layer, x) for layer in layers])
    return runs


def numba_runs(kind: str, outputs: int, inputs: int, threads: int, cache: int) -> dict[str, Callable[[], float]]:
    """The library's product and those by Numba, of activations that are rotated already.

    Raises:
        ValueError: their results differ.
    """
    x = torch.randn(1, inputs)
    runs: dict[str, list[Call]] = {}
    for seed in range(cache // (outputs * inputs // 4) + 1):
        weight = random_weight(kind, outputs, inputs, seed)
        multiply = partial(launch.multiply, x, launch.describe(weight), outputs, None, None)
        runs.setdefault(kind, []).append(multiply)
        for name, product in cpu_numba.PRODUCTS[kind](weight).items():
            call = partial(product, x[0].numpy())
            if seed == 0 and relative_difference(torch.from_numpy(call()), multiply()[0]) > 1e-3:
                raise ValueError(f"{kind}: Numba ({name}) and the library have different results")
            runs.setdefault(f"Numba ({name})", []).append(call)
    cpu_numba.use_threads(threads)
    return {name: repeated(calls) for name, calls in runs.items()}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------------------------------- the command


def setup(smoke: bool) -> dict[str, Any]:
    """What figures depend on: machine, versions, hash of the kernels."""
    source = Path(hf_pcdvq_kernels.__file__).parent
    files = sorted(file for file in source.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    files = [file for file in files if "triton" not in file.relative_to(source).parts]  # kernels of other devices
    return {
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "flags": " ".join(flag for flag in FLAGS if flag in _cpu_flags()),
        **package_versions(),
        "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12],
        "run": "smoke" if smoke else "full",
    }


def _cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--instructions", choices=("avx512", "avx2", "portable"), help="default: the best of this CPU"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=tuple(MODELS),
        metavar="NAME",
        help=f"to generate: {', '.join(MODELS)}",
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/cpu_<machine>.json)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work" / "cpu", help="models and environments (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of layers (default: %(default)s)")
    parser.add_argument("--rounds-of-models", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=8, help="of the part quality (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print and plot what is in the file, measure nothing")
    parser.add_argument("--markdown", action="store_true", help="with --table: print tables for docs/cpu.md")
    parser.add_argument("--smoke", action="store_true", help="a tiny test run; needs --out and --work")
    add_text_options(parser)
    args = parser.parse_args()
    args.texts = texts_of(parser, args)
    if args.smoke and (args.out is None or args.work == parser.get_default("work")):
        parser.error("--smoke needs --out and --work: its figures mean nothing")
    machine = re.sub(r"[^a-z0-9]+", "_", cpu_name().lower()).strip("_")
    args.out = args.out or ROOT / "benchmarks" / "results" / f"cpu_{machine}.json"
    args.work = args.work.resolve()
    args.sizes, args.tokens, args.middle, args.prefill, args.length = SIZES, TOKENS, MIDDLE, PREFILL, 512
    args.numba_sizes, args.cache = SIZES, cpu_models.CACHE
    if args.smoke:
        args.sizes, args.tokens, args.middle, args.prefill, args.length = ((256, 128),), (1, 32), "tiny", 32, 64
        args.numba_sizes, args.cache = ((256, 256),), 1 << 18  # or thousands of such small layers would be made
        args.models, args.rounds, args.rounds_of_models, args.windows = ("tiny",), 2, 2, 1
    return args


def keep_to(instructions: str | None) -> str:
    """Use an instruction set, in PyTorch as well, for which this process may start anew; None takes the best.

    Returns the name of the instruction set. Exits if the library or the CPU lacks it.
    """
    if instructions == "avx2" and any(os.environ.get(name) != value for name, value in MASKED.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | MASKED)  # PyTorch reads them once
    library = load()
    if not isinstance(library, Library):
        sys.exit(f"the CPU kernels are missing: {library}")
    if instructions is None:
        return library.instructions[0]
    try:
        library.set_instructions(instructions)
    except ValueError as error:
        sys.exit(str(error))
    if (
        instructions == "avx2"
    ):  # PyTorch multiplies bf16 with oneDNN on CPUs with AVX-512 only, whatever the mask says
        torch.backends.mkldnn.set_flags(False)
    return instructions


def show(results: Results) -> None:
    """Print the table and draw the plot."""
    Console(width=170).print(table(results.rows, results.setup))
    picture = results.file.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"no plot: matplotlib is not installed. Where it is: python benchmarks/bench_cpu.py --table --out {results.file}"
        )
    elif plot_results(results, picture):
        print(f"plot: {picture}")


def run(results: Results, args: argparse.Namespace) -> None:
    """Measure what is missing in the results. A part that fails does not keep the others from running."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    disable_progress_bar()  # a line for each row says enough
    hf_pcdvq.set_backend("cpu")  # missing kernels are an error here
    bench = Bench(results, args)
    failed = []
    for part in args.parts:
        try:
            getattr(bench, part)()
        except Exception as error:  # whatever it is, it is reported, and the other parts are measured
            print(f"{part} FAILED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(part)
        finally:
            hf_pcdvq.set_backend("cpu")
    show(results)
    if failed:
        sys.exit(f"{', '.join(failed)} failed, see above")


def main() -> None:
    args = arguments()
    try:
        if args.table:
            stored = Results.read(args.out)
            print(markdown(stored.rows)) if args.markdown else show(stored)
            return
        args.instructions = keep_to(args.instructions)
        results = Results.opened(args.out, setup(args.smoke))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    for row in results.rows:
        print(f"in {args.out.name}: {line(row)}")
    try:
        run(results, args)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {args.out} keeps what was measured, and the same command continues from there")


if __name__ == "__main__":
    main()
