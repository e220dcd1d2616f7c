"""How a product is cut into programs, from its shape alone.

Nothing is measured while a model runs, so that a product may be captured in a CUDA graph; `tuned.py` has what was measured
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

DOT_TOKENS = 64  # products of more tokens decode the weight and leave the product to PyTorch
VECTOR_TOKENS = 8  # products of more tokens multiply matrices, instead of adding up products of float16 pairs
# Inputs that a lane takes at a time: the unit of `activations.py`; of `stream` CHAIN pairs, which are not loaded together.
LANE_INPUTS = {"pcdvq": 32, "ccq": 64, "stream": 32}


@dataclass(frozen=True)
class Config:
    """How a product is launched."""

    rows: int  # output channels per program
    warps: int
    splits: int  # programs that share the inputs of a channel


@dataclass(frozen=True)
class Shape:
    """What a config depends on."""

    codec: str  # "pcdvq 2.25", "ccq 2.5", "stream 2.0"
    tokens: int  # a power of two
    rows: int
    columns: int

    @property
    def lane_inputs(self) -> int:
        return LANE_INPUTS[self.codec.split()[0]]


def tokens_per_program(tokens: int) -> int:
    """The number of tokens that a kernel is compiled for: a power of two, at least 16 for matrix units."""
    power = 1 << (tokens - 1).bit_length()
    return power if tokens <= VECTOR_TOKENS else max(power, 16)


def unit_warps(shape: Shape) -> int:
    """Warps that a block of inputs can occupy, a power of two."""
    if shape.tokens > VECTOR_TOKENS:
        return 8
    blocks = max(1, shape.columns // (32 * shape.lane_inputs))
    return 1 << (min(blocks, 4).bit_length() - 1)


def block_inputs(shape: Shape, warps: int) -> int:
    """Inputs that a program takes at a time; splits lie at multiples of it."""
    units = 32 if shape.tokens > VECTOR_TOKENS else 32 * warps
    return units * shape.lane_inputs


def row_choices(shape: Shape) -> tuple[int, ...]:
    """Output channels per program that a kernel can take without spilling registers; the default first."""
    stream, coarse = shape.codec.startswith("stream"), shape.codec == "stream 4.0"
    if shape.tokens > VECTOR_TOKENS:
        return (64,)
    if stream:
        return (4,) if shape.tokens == 8 else (8,) if coarse else (16, 8)
    if shape.codec == "ccq 2.75":
        return {1: (8, 4), 2: (4,), 4: (2,), 8: (2,)}[shape.tokens]
    if shape.codec.startswith("ccq"):
        return {1: (8, 4), 2: (8, 4), 4: (4,), 8: (2,)}[shape.tokens]
    return {1: (8, 4), 2: (8, 4), 4: (4, 2), 8: (4,)}[shape.tokens]


def candidates(shape: Shape) -> list[Config]:
    """Every config that makes sense."""
    found = []
    for rows in row_choices(shape):
        for warps in (1, 2, 4) if shape.tokens <= VECTOR_TOKENS else (8,):
            if warps > unit_warps(shape):
                continue
            most = -(-shape.columns // block_inputs(shape, warps))
            found += [Config(rows, warps, splits) for splits in (1, 2, 4, 8, 16) if splits <= most]
    return found


def default(shape: Shape, processors: int) -> Config:
    """A config that keeps this many multiprocessors busy, without measuring."""
    rows = row_choices(shape)[0]
    warps = unit_warps(shape)
    # Twice what fits at some 190 registers a thread: 16 warps on every multiprocessor.
    wanted = -(-16 * processors // (warps * -(-shape.rows // rows)))
    return Config(rows, warps, max(1, min(wanted, -(-shape.columns // block_inputs(shape, warps)))))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device, or what comes next to them."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
