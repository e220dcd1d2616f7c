"""What the launcher needs to know about the Triton kernels of one family of formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..formats import PackedWeight
from .activations import TOGETHER, Order

Packed = TypeVar("Packed", bound=PackedWeight)


class FormatKernels(ABC, Generic[Packed]):
    """The kernels of a family and how to launch them. Each subclass is defined next to its kernels.

    The kernels' arguments are, by name:

        matmul_kernel       p_x, p_x_scale, the operands, p_experts, p_out, tokens, rows, the matmul sizes, stack,
                            span, the matmul constants, T, BLOCK_N, UNITS, DOT, PTX, PDL, GROUPED
        dequantize_kernel   p_out, the operands, first, stop, the dequantize sizes, the constants, ROWS, COLUMNS, PTX

    Attributes:
        lane_inputs: inputs that each lane takes at a time.
        dot_lane_inputs: the same in products with matrix units; None if as many.
        product_multiple: products have a kernel only if the number of inputs is a multiple of this, as several words
            of a row are read at once.
        activation_dtype: the dtype as which the product reads prepared activations.
    """

    matmul_kernel: ClassVar[Any]
    dequantize_kernel: ClassVar[Any]
    lane_inputs: ClassVar[int]
    dot_lane_inputs: ClassVar[int | None] = None
    product_multiple: ClassVar[int]
    activation_dtype: ClassVar[torch.dtype] = torch.int64

    @abstractmethod
    def operands(self, weight: Packed) -> dict[str, Tensor]:
        """The packed tensors, by the names of the kernel arguments."""

    @abstractmethod
    def constants(self, weight: Packed) -> dict[str, Any]:
        """The compile-time constants of the kernels."""

    def matmul_constants(self, weight: Packed, block_n: int, dot: bool) -> dict[str, Any]:
        """The same for products of `block_n` output channels per program, with matrix units if `dot`."""
        return self.constants(weight)

    def matmul_sizes(self, weight: Packed) -> dict[str, int]:
        """Sizes that `matmul_kernel` takes in addition to tokens and rows."""
        return {"units": weight.columns // self.lane_inputs}

    def dequantize_sizes(self, weight: Packed) -> dict[str, int]:
        """Sizes that `dequantize_kernel` takes."""
        return {"columns": weight.columns}

    def order(self, name: str, units: int, dot: bool) -> Order:
        """The order in which products, with matrix units if `dot`, read their activations if a program takes `units` units at a time."""
        return Order(self.lane_inputs, 1, units, TOGETHER if dot else 1)

    @abstractmethod
    def block_n(self, name: str) -> tuple[int, ...]:
        """Numbers of output channels per program that do not spill registers, for products of one token; the default first.

        Args:
            name: name of the format.
        """

    def dot_block_n(self, name: str) -> tuple[int, ...]:
        """The same for products with matrix units, whose matrices have 16 rows."""
        return (32, 16)


def aligned(table: Tensor) -> Tensor:
    """The table, copied if it is not aligned for reads of eight bytes."""
    return table if table.data_ptr() % 8 == 0 else table.clone()


def given(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """`tensor`, or `stand_in` if None: kernels cannot take None, and do not read what a format lacks."""
    return stand_in if tensor is None else tensor
