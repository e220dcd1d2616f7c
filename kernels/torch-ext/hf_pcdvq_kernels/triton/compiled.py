"""Compiles every kernel for devices that need not be there, and counts what the compiler made of it."""

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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..formats import CCQ_LAYOUTS, CODECS, stream_layout
from . import activations, ccq, launch, launch_config, pcdvq, stream, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A large layer, so that the config is that of a device with much to do.
ROWS, COLUMNS, PROCESSORS = 8192, 8192, 132


class Variant(NamedTuple):
    """One kernel as it is launched."""

    name: str
    kernel: Any
    types: dict[str, str]  # of its arguments, by their names
    constants: dict[str, Any]
    warps: int
    weights: float  # per thread and turn of the main loop; 0: not counted


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a kernel for one device."""

    registers: int
    spills: int  # bytes per thread on NVIDIA, registers on AMD
    shared: int  # bytes
    instructions: float | None  # per decoded weight in the main loop, NVIDIA only


def products(tokens: tuple[int, ...] = (1, 8, 16, 64)) -> Iterator[Variant]:
    """The kernels of products, bfloat16, with their default configs."""
    for codec in CODECS:
        for count in tokens:
            shape = launch_config.Shape(codec, count, ROWS, COLUMNS)
            yield product(codec, count, launch_config.default(shape, PROCESSORS))


def grouped_products() -> Iterator[Variant]:
    """The kernels of products with weights of a stack, of one token each and of many."""
    for codec in CODECS:
        for count in (1, 16, 64):
            shape = launch_config.Shape(codec, count, ROWS, COLUMNS)
            yield product(codec, count, launch_config.default(shape, 1), grouped=True)


def product(codec: str, tokens: int, choice: launch_config.Config, grouped: bool = False) -> Variant:
    """The kernel of a product of bfloat16."""
    method = codec.split()[0]
    dot = tokens > launch_config.VECTOR_TOKENS
    units = 32 if dot else 32 * choice.warps
    constants = {
        **_format(codec),
        "T": tokens,
        "R": choice.rows,
        "UNITS": units,
        "DOT": dot,
        "BF16": True,
        "PTX": True,
        "GROUPED": grouped,
    }
    x = {"p_x": "*i32" if method == "stream" else "*i64", "p_x_scale": "*fp32"}
    sizes = ["tokens", "rows", "columns", "words", "span"]
    if method == "pcdvq":
        kernel = pcdvq.matmul_kernel
        sizes = ["tokens", "rows", "units", "span"]
    elif method == "ccq":
        kernel = ccq.matmul_kernel
        sizes = ["tokens", "rows", "units", "span"]
    else:
        kernel = stream.matmul_kernel
        constants["CHANNELS"] = stream.channels(constants) if dot else choice.rows
    types = {**x, **_packed(codec), "p_experts": "*i32", "p_out": "*bf16", **dict.fromkeys(sizes, "i32")}
    weights = choice.rows * units * launch_config.LANE_INPUTS[method] / (32 * choice.warps)
    name = f"{codec}, {tokens} tokens{' of experts' if grouped else ''}"
    return Variant(name, kernel, types, constants, choice.warps, weights)


def others() -> Iterator[Variant]:
    """The kernels besides those of products."""
    names = ("p_weight", "p_1", "p_2", "p_3", "p_4")
    for codec in CODECS:
        packed = [*_packed(codec).values(), "*fp32", "*fp32", "*fp32"][:5]
        types = {"p_out": "*bf16", **dict(zip(names, packed)), **dict.fromkeys(("first", "stop", "columns", "words"), "i32")}  # fmt: skip
        form = _format(codec)
        unused = {name: 0 for name in tiles.dequantize_kernel.arg_names[14:]}
        tile = {"CODEC": codec.split()[0], "ROWS": launch.TILE_ROWS, "COLUMNS": launch.TILE_COLUMNS, "PTX": True}
        yield Variant(f"{codec}, decoding", tiles.dequantize_kernel, types, {**tile, **unused, **form}, 4, 0)
    types = {"p_x": "*bf16", "p_signs": "*fp32", "p_out": "*bf16", "numbers": "i32"}
    constants = {"INVERSE": False, "BLOCK": 128, "TILE": activations.TILE}
    yield Variant("rotation", activations.hadamard_kernel, types, constants, 4, 0)
    for scale in (True, False):
        order = activations.Order(64, 7, 64)
        types = {"p_x": "*bf16", "p_signs": "*fp32", "p_out": "*fp16" if scale else "*bf16", "p_scale": "*fp32"}
        types |= {"columns": "i32", "blocks": "i32"}
        constants = {"BLOCK": 128, "UNIT": order.unit, "SLOTS": order.slots, "PLACES": order.places}
        constants |= {"QUADS": order.quads, "UNITS": order.units, "SCALE": scale, "TILE": activations.TILE}
        name = f"activations, {'pairs' if scale else 'matrices'}"
        yield Variant(name, activations.prepare_kernel, types, constants, 4, 0)
    types = {"p_parts": "*fp32", "p_out": "*bf16", "numbers": "i32", "splits": "i32"}
    yield Variant("sum of the splits", tiles.sum_kernel, types, {"TILE": 512}, 4, 0)


@cache
def variants() -> dict[str, Variant]:
    """Every kernel as it is launched by default, by its name."""
    return {variant.name: variant for variant in (*products(), *grouped_products(), *others())}


def measure_all(pairs: Iterable[tuple[str, str]], jobs: int) -> Iterator[tuple[tuple[str, str], Figures]]:
    """Compile kernels for devices, both by name, in `jobs` processes; each pair with its figures when it is done."""
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
    """Compile a kernel for a device, and count."""
    constants = dict(variant.constants)
    if target.backend != "cuda" and "PTX" in constants:
        constants["PTX"] = False
    names = list(variant.types)
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
        options={"num_warps": variant.warps, **launch.OPTIONS},
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
    """Instructions of the first loop that is at least half as long as the longest."""
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
    # An instruction may branch to itself, behind the end of a kernel.
    longest = max(stop - start for start, stop in loops)
    start, stop = next(loop for loop in loops if loop[1] - loop[0] >= longest / 2)
    return instructions[start:stop]


def _format(codec: str) -> dict[str, Any]:
    method, setting = codec.split()
    if method == "pcdvq":
        return {"PATTERNS": 512 if setting == "2.25" else 128}
    if method == "ccq":
        return ccq.constants(CCQ_LAYOUTS[setting])
    return stream.constants(stream_layout(float(setting), 12))


def _packed(codec: str) -> dict[str, str]:
    method, setting = codec.split()
    if method == "pcdvq":
        return {
            "p_weight": "*i16",
            "p_magnitude": "*u8",
            "p_scale": "*fp32",
            "p_patterns": "*i8",
            "p_levels": "*fp32",
        }
    if method == "ccq":
        rest = {"p_scale": "*fp32", "p_local": "*u8", "p_code_scale": "*fp32", "p_code_zero": "*fp32"}
        return {"p_weight": "*i16" if setting == "2.5" else "*u8", **rest}
    return {"p_weight": "*i32", "p_scale": "*fp32"}


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the tools in Triton's wheel prints about a compiled kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout
