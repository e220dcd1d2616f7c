"""Compiles every kernel for devices that need not be present, and reports the resources of the compiled code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..formats import FORMATS, PackedWeight
from ..random_weights import random_weight
from . import activations, launch, launch_config, tiles
from .device import OPTIONS, TRITON_HAS_PDL
from .format_kernels import FormatKernels
from .launch_config import LaunchConfig, Shape, kernels_of

KERNEL_FORMATS = [name for name, family in FORMATS.items() if family.has_kernels]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A large layer, so that the launch config is that of a fully occupied device.
ROWS, COLUMNS, PROCESSORS = 8192, 8192, 132


class Variant(NamedTuple):
    """One kernel, specialized as for a launch."""

    name: str
    kernel: Any
    types: dict[str, str]  # of its arguments, by name
    constants: dict[str, Any]
    warps: int
    weights: float  # per thread and iteration of the main loop; 0: not counted


@dataclass(frozen=True)
class Figures:
    """Resources of a kernel compiled for one device."""

    registers: int
    spills: int  # bytes per thread on NVIDIA, registers on AMD
    shared: int  # bytes
    instructions: float | None  # per decoded weight in the main loop, NVIDIA only


def products(tokens: tuple[int, ...] = (1, 8, 16, 64)) -> Iterator[Variant]:
    """The product kernels for bfloat16, with their default configs."""
    for name in KERNEL_FORMATS:
        for count in tokens:
            shape = Shape(name, count, ROWS, COLUMNS)
            yield product(shape, launch_config.default(shape, PROCESSORS))


def grouped_products() -> Iterator[Variant]:
    """The kernels of grouped products, for one token per group and for many."""
    for name in KERNEL_FORMATS:
        for count in (1, 16, 64):
            shape = Shape(name, count, ROWS, COLUMNS)
            yield product(shape, launch_config.default(shape, 1), grouped=True)


def product(shape: Shape, config: LaunchConfig, grouped: bool = False) -> Variant:
    """The product kernel for bfloat16."""
    weight, kernels = _example(shape.format), kernels_of(shape.format)
    units = shape.units(config.num_warps)
    types = {
        "p_x": _pointer(kernels.activation_dtype),
        "p_x_scale": "*fp32",
        **_operand_types(kernels, weight),
        "p_experts": "*i32",
        "p_out": "*bf16",
        **dict.fromkeys(("tokens", "rows", *kernels.matmul_sizes(weight), "stack", "span"), "i32"),
    }
    constants = {
        **kernels.matmul_constants(weight, config.block_n, shape.dot),
        "T": shape.tokens,
        "BLOCK_N": config.block_n,
        "UNITS": units,
        "DOT": shape.dot,
        "PTX": True,
        "PDL": True,
        "GROUPED": grouped,
    }
    weights = config.block_n * units * shape.lane_inputs / (32 * config.num_warps)
    name = f"{shape.format}, {shape.tokens} tokens{' of experts' if grouped else ''}"
    return Variant(name, kernels.matmul_kernel, types, constants, config.num_warps, weights)


def dequantizations() -> Iterator[Variant]:
    """The kernels that decode whole weights."""
    for name in KERNEL_FORMATS:
        weight, kernels = _example(name), kernels_of(name)
        sizes = ("first", "stop", *kernels.dequantize_sizes(weight))
        types = {"p_out": "*bf16", **_operand_types(kernels, weight), **dict.fromkeys(sizes, "i32")}
        tile = {"ROWS": launch.TILE_ROWS, "COLUMNS": launch.TILE_COLUMNS, "PTX": True}
        constants = {**kernels.constants(weight), **tile}
        yield Variant(f"{name}, decoding", kernels.dequantize_kernel, types, constants, 4, 0)


def others() -> Iterator[Variant]:
    """The kernels that are not specific to a format."""
    types = {"p_x": "*bf16", "p_signs": "*fp32", "p_out": "*bf16", "numbers": "i32"}
    constants = {"INVERSE": False, "BLOCK": 128, "TILE": activations.TILE}
    yield Variant("rotation", activations.hadamard_kernel, types, constants, 4, 0)
    for matrix in (False, True):
        order = activations.Order(64, 7, *((launch_config.DOT_UNITS, activations.TOGETHER) if matrix else (64,)))
        types = {"p_x": "*bf16", "p_signs": "*fp32", "p_out": "*fp16", "p_scale": "*fp32"}
        types |= {"tokens": "i32", "columns": "i32", "blocks": "i32"}
        constants = {"BLOCK": 128, "UNIT": order.unit, "SLOTS": order.slots, "PLACES": order.places}
        constants |= {
            "QUADS": order.quads,
            "UNITS": order.units,
            "TOGETHER": order.together,
            "PDL": True,
            "TILE": activations.TILE,
            "CHUNK": activations.CHUNK,
        }
        name = f"activations, {'matrices' if matrix else 'pairs'}"
        yield Variant(name, activations.prepare_kernel, types, constants, 4, 0)
    types = {"p_parts": "*fp32", "p_out": "*bf16", "numbers": "i32", "splits": "i32"}
    yield Variant("sum of the splits", tiles.sum_kernel, types, {"TILE": 512}, 4, 0)


@cache
def variants() -> dict[str, Variant]:
    """Every kernel as it is launched by default, by name."""
    return {variant.name: variant for variant in (*products(), *grouped_products(), *dequantizations(), *others())}


def measure_all(pairs: Iterable[tuple[str, str]], jobs: int) -> Iterator[tuple[tuple[str, str], Figures]]:
    """Compile (kernel, device) pairs, by name, in `jobs` processes; yields each with its figures as it completes."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_measure_named, *pair): pair for pair in pairs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _measure_named(name: str, target: str) -> Figures:
    return measure(variants()[name], TARGETS[target])


def measure(variant: Variant, target: GPUTarget) -> Figures:
    """Compile a kernel for a device and collect its figures."""
    constants = dict(variant.constants)
    if target.backend != "cuda" and "PTX" in constants:
        constants["PTX"] = False
    if not (target.backend == "cuda" and target.arch >= 90 and TRITON_HAS_PDL) and "PDL" in constants:
        constants["PDL"] = False
    names = list(variant.kernel.arg_names)
    # Pointers are aligned, and sizes are multiples of 16 in a large layer; Triton compiles for that when it launches.
    aligned = [i for i, name in enumerate(names) if name.startswith("p_") or name in ("rows", "units", "columns")]
    compiled = triton.compile(
        ASTSource(
            variant.kernel,
            {**variant.types, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=target,
        options={"num_warps": variant.warps, **OPTIONS},
    )
    if target.backend != "cuda":
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1]) for what in ("count", "spill_count"))
        return Figures(registers, spills, compiled.metadata.shared, None)
    used = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers, spills = (int(re.search(rf"{what}:(\d+)", used)[1]) for what in ("REG", "STACK"))
    instructions = None
    if variant.weights:
        loop = main_loop(_tool("nvdisasm", "-c", compiled.asm["cubin"]))
        instructions = len(loop) / variant.weights
    return Figures(registers, spills, compiled.metadata.shared, instructions)


def main_loop(sass: str) -> list[str]:
    """Instructions of the first loop that is at least half as long as the longest one."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x?_?\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*`\((\.L_x?_?\w+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
    # An instruction may branch to itself, after the end of a kernel.
    longest = max(stop - start for start, stop in loops)
    start, stop = next(loop for loop in loops if loop[1] - loop[0] >= longest / 2)
    return instructions[start:stop]


@cache
def _example(name: str) -> PackedWeight:
    """A weight in a format, for the dtypes of its tensors; its size does not matter."""
    return random_weight(name, 256, 256)


def _operand_types(kernels: FormatKernels, weight: PackedWeight) -> dict[str, str]:
    return {name: _pointer(tensor.dtype) for name, tensor in kernels.operands(weight).items()}


def _pointer(dtype: torch.dtype) -> str:
    """Triton's name for the type of a pointer to values of a dtype."""
    if dtype.is_floating_point:
        return f"*fp{8 * dtype.itemsize}"
    return f"*{'i' if dtype.is_signed else 'u'}{8 * dtype.itemsize}"


def _tool(name: str, option: str, cubin: bytes) -> str:
    """The output of one of the tools in Triton's wheel for a compiled kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout
