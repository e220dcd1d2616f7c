"""Compiles the kernels that the other steps launch, in parallel processes, into Triton's cache.

Nothing runs: every launch is told to compile only, with the arguments, and so with the specializations, of a real one.
It therefore works without a GPU too, for the target given, and shows there what does not compile:

    python tools/gpu_proof/compile.py --target 90
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import tune
from hf_pcdvq_kernels.formats import FORMATS, PackedWeight
from hf_pcdvq_kernels.triton import device, launch, launch_config, product
from hf_pcdvq_kernels.triton.launch_config import LaunchConfig, Shape

NAMES = [name for name, family in FORMATS.items() if family.has_kernels]
BENCHED = tune.FORMATS
PROVED = ((4096, 4096), (19, 576))
DECODED = (torch.bfloat16, torch.float16, torch.float32)
PROCESSORS = 132  # of an H100 or H200: default configs depend on it


class Launch(NamedTuple):
    """One launch."""

    rows: int
    columns: int
    dtype: torch.dtype
    config: LaunchConfig | None = None  # None: decoding


class Task(NamedTuple):
    """Launches of one kernel, which one process compiles: few of them differ in what they are specialized for."""

    name: str
    tokens: int  # 0: the kernels that decode
    block_n: int
    num_warps: int
    launches: tuple[Launch, ...]
    target: int | None


def tasks(target: int | None) -> Iterator[Task]:
    """All of them, those that the first steps need first."""
    for tokens in (1, 8, 16, 64):
        for name in sorted(NAMES, key=lambda name: name not in BENCHED):
            yield from _products(name, tokens, target)
        if tokens == 1:
            for name in NAMES:
                yield Task(name, 0, 0, 0, tuple(Launch(*size, dtype) for size in PROVED for dtype in DECODED), target)


def _products(name: str, tokens: int, target: int | None) -> Iterator[Task]:
    launches: dict[tuple[int, int], list[Launch]] = {}
    for size in {*PROVED, *(tune.SIZES if name in BENCHED else ())}:
        shape = Shape(name, launch_config.tokens_per_program(tokens), *size)
        default = launch_config.default(shape, PROCESSORS)
        wanted = [Launch(*size, torch.bfloat16, default)]
        if size in PROVED:
            wanted.append(Launch(*size, torch.float16, default))
        if size in tune.SIZES and name in BENCHED and tokens in tune.TOKENS:
            wanted += [Launch(*size, torch.bfloat16, config) for config in launch_config.candidates(shape)]
        for one in wanted:
            launches.setdefault((one.config.block_n, one.config.num_warps), []).append(one)
    for key, found in launches.items():
        yield Task(name, tokens, *key, tuple(found), target)


@contextmanager
def compiling_only(target: int | None) -> Iterator[list[Any]]:
    """Launches of Triton kernels compile and do not run; yields the list of what they compiled.

    Args:
        target: the compute capability to compile for, times ten, whatever device there is; None: that of this machine's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    launched = JITFunction.run

    def run(self, *args, **options):
        compiled.append(launched(self, *args, **{**options, "warmup": True}))

    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    if target is None:
        has_pdl = device.has_pdl(torch.accelerator.current_accelerator())
    else:
        driver.set_active(pretended)
        has_pdl = target >= 90 and device.TRITON_HAS_PDL
    with (
        mock.patch.object(JITFunction, "run", run),
        # Tensors are on the CPU, without contents; only their dtypes and addresses count.
        mock.patch.object(product, "has_ptx", lambda device: True),
        mock.patch.object(launch, "has_ptx", lambda device: True),
        mock.patch.object(product, "has_pdl", lambda device: has_pdl),
    ):
        yield compiled


def empty_weight(name: str, rows: int, columns: int) -> PackedWeight:
    """A weight of which nothing but the shapes and dtypes are defined."""
    family = FORMATS[name]
    tensors = {
        argument: torch.empty(shape, dtype=dtype)
        for specs in (family.specs(name, rows, columns), family.table_specs(name))
        for argument, (shape, dtype) in specs.items()
    }
    values = {**family.parameters(name), **tensors}
    return family.checked("compile", *(values.get(argument.name) for argument in family.arguments))


def compile_all(task: Task) -> tuple[int, float, str]:
    """Number of launches, seconds, and the traceback of the first error, or nothing."""
    started, error = time.perf_counter(), ""
    with compiling_only(task.target) as compiled:
        try:
            for launched in task.launches:
                _compile(task, launched)
        except Exception:  # whatever it is, the other tasks go on
            error = traceback.format_exc()
    return len(compiled), time.perf_counter() - started, error


def _compile(task: Task, launched: Launch) -> None:
    rows, columns, dtype, config = launched
    weight = empty_weight(task.name, rows, columns)
    if config is None:
        launch.dequantize(weight, dtype)
        return
    signs = torch.empty(min(128, columns & -columns))
    product.product(torch.empty(1, task.tokens, columns, dtype=dtype), weight, signs, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="not used: what is compiled goes to Triton's cache")
    parser.add_argument("--target", type=int, help="compute capability times ten (default: this machine's GPU)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="compile one kernel for compute capability 9.0")
    args = parser.parse_args()
    wanted = list(tasks(90 if args.dry_run else args.target))
    if args.dry_run:
        os.environ.pop("TRITON_INTERPRET", None)  # of the processes below, which compile
        wanted = [Task("ccq-2.5", 0, 0, 0, (Launch(19, 576, torch.float32),), 90)]
    started, failed = time.perf_counter(), 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for task, (count, seconds, error) in zip(wanted, pool.map(compile_all, wanted)):
            what = (
                f"{task.tokens} tokens, {task.block_n} channels, {task.num_warps} warps"
                if task.tokens
                else "decoding"
            )
            print(f"{task.name}, {what}: {count} launches, {seconds:.1f} s{', failed' if error else ''}", flush=True)
            if error:
                failed += 1
                print(error, flush=True)
    print(f"{len(wanted)} tasks, {failed} failed, {time.perf_counter() - started:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
