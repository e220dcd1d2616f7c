"""How a product is divided into programs, from its shape alone.

Nothing is measured while a model runs, so that a product can be captured in a CUDA graph; `tuned.py` holds configs
that were measured beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..formats import family_of
from .device import TRITON
from .format_kernels import FormatKernels

DOT_TOKENS = 64  # for more tokens, the weight is decoded and PyTorch multiplies
VECTOR_TOKENS = 1  # for more tokens, kernels use matrix units instead of accumulating products of float16 pairs
DOT_UNITS = 4  # see `half2.dot4`
LEAST_DOT_TOKENS = 8 if TRITON >= (3, 5) else 16  # columns of the smallest matrix that Triton multiplies with


@dataclass(frozen=True)
class LaunchConfig:
    """The launch parameters of a product."""

    block_n: int  # output channels per program
    num_warps: int
    split_k: int  # programs that the inputs of a channel are divided among


@dataclass(frozen=True)
class Shape:
    """The properties of a product that its launch config depends on."""

    format: str  # "pcdvq-2.25", "ccq-2.5", "stream-2.0"
    tokens: int  # a power of two
    rows: int
    columns: int

    @property
    def dot(self) -> bool:
        """Whether the kernel uses matrix units."""
        return self.tokens > VECTOR_TOKENS

    @property
    def lane_inputs(self) -> int:
        kernels = kernels_of(self.format)
        return kernels.dot_lane_inputs or kernels.lane_inputs if self.dot else kernels.lane_inputs

    def units(self, num_warps: int) -> int:
        """Units of inputs that a program takes at a time."""
        return DOT_UNITS if self.dot else 32 * num_warps

    def block_inputs(self, num_warps: int) -> int:
        """Inputs that a program takes at a time; splits are at multiples of it."""
        return self.units(num_warps) * self.lane_inputs


def kernels_of(name: str) -> FormatKernels:
    """The kernels of a format.

    Raises:
        ValueError: unknown format, or one without kernels.
    """
    return family_of(name).kernels()


def tokens_per_program(tokens: int) -> int:
    """The number of tokens that a kernel is compiled for: a power of two."""
    power = 1 << (tokens - 1).bit_length()
    return power if tokens <= VECTOR_TOKENS else max(power, LEAST_DOT_TOKENS)


def most_warps(shape: Shape) -> int:
    """Number of warps that a block of inputs can occupy, a power of two."""
    if shape.dot:
        return 1
    blocks = max(1, shape.columns // (32 * shape.lane_inputs))
    return 1 << (min(blocks, 4).bit_length() - 1)


def unit_warps(shape: Shape) -> int:
    """Number of warps by default: two are the fastest for most layers on an H200."""
    return min(most_warps(shape), 2)


def block_n_choices(shape: Shape) -> tuple[int, ...]:
    """Numbers of output channels per program that do not spill registers; the default first."""
    kernels = kernels_of(shape.format)
    return kernels.dot_block_n(shape.format) if shape.dot else kernels.block_n(shape.format)


def candidates(shape: Shape) -> list[LaunchConfig]:
    """Every config worth measuring."""
    found = []
    for block_n in block_n_choices(shape):
        for num_warps in (1, 2, 4):
            if num_warps > most_warps(shape):
                continue
            most = -(-shape.columns // shape.block_inputs(num_warps))
            found += [LaunchConfig(block_n, num_warps, split_k) for split_k in (1, 2, 4, 8, 16) if split_k <= most]
    return found


@cache
def default(shape: Shape, processors: int) -> LaunchConfig:
    """An unmeasured config that keeps this many multiprocessors busy."""
    block_n = block_n_choices(shape)[0]
    num_warps = unit_warps(shape)
    # Twice what fits at some 190 registers per thread: 16 warps on every multiprocessor; with some 100 for matrix units, 24.
    warps = 24 if shape.dot else 16
    wanted = -(-warps * processors // (num_warps * -(-shape.rows // block_n)))
    split_k = max(1, min(wanted, -(-shape.columns // shape.block_inputs(num_warps))))
    return LaunchConfig(block_n, num_warps, split_k)


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a device, or of its closest equivalent."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
