"""What the launcher needs to know about the Triton kernels of one family of formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..formats import PackedWeight
from .activations import Order

Packed = TypeVar("Packed", bound=PackedWeight)


class FormatKernels(ABC, Generic[Packed]):
    """The kernels of a family and how to launch them. Each subclass is defined next to its kernels.

    The kernels' arguments are, by name:

        matmul_kernel       p_x, p_x_scale, the operands, p_experts, p_out, tokens, rows, the matmul sizes, stack,
                            span, the matmul constants, T, BLOCK_N, UNITS, DOT, BF16, PTX, PDL, GROUPED
        dequantize_kernel   p_out, the operands, first, stop, the dequantize sizes, the constants, ROWS, COLUMNS, PTX

    Attributes:
        lane_inputs: inputs that each lane takes at a time.
        product_multiple: products have a kernel only if the number of inputs is a multiple of this, as several words
            of a row are read at once.
        activation_dtype: the dtype as which the product reads prepared activations.
    """

    matmul_kernel: ClassVar[Any]
    dequantize_kernel: ClassVar[Any]
    lane_inputs: ClassVar[int]
    product_multiple: ClassVar[int]
    activation_dtype: ClassVar[torch.dtype] = torch.int64

    @abstractmethod
    def operands(self, weight: Packed) -> dict[str, Tensor]:
        """The packed tensors, by the names of the kernel arguments."""

    @abstractmethod
    def constants(self, weight: Packed) -> dict[str, Any]:
        """The compile-time constants of the kernels."""

    def matmul_constants(self, weight: Packed, block_n: int, dot: bool) -> dict[str, Any]:
        """The same for products of `block_n` output channels per program, which use `tl.dot` if `dot`."""
        return self.constants(weight)

    def matmul_sizes(self, weight: Packed) -> dict[str, int]:
        """Sizes that `matmul_kernel` takes in addition to tokens and rows."""
        return {"units": weight.columns // self.lane_inputs}

    def dequantize_sizes(self, weight: Packed) -> dict[str, int]:
        """Sizes that `dequantize_kernel` takes."""
        return {"columns": weight.columns}

    def order(self, name: str, units: int) -> Order:
        """The order in which products read their activations if a program takes `units` units at a time."""
        return Order(self.lane_inputs, 1, units)

    @abstractmethod
    def block_n(self, name: str, tokens: int) -> tuple[int, ...]:
        """Numbers of output channels per program that do not spill registers; the default first.

        Args:
            name: name of the format.
            tokens: 1, 2, 4 or 8; products of more tokens use `tl.dot`, with 64 output channels.
        """


def aligned(table: Tensor) -> Tensor:
    """The table, copied if it is not aligned for reads of eight bytes."""
    return table if table.data_ptr() % 8 == 0 else table.clone()


def given(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """`tensor`, or `stand_in` if None: kernels cannot take None, and do not read what a format lacks."""
    return stand_in if tensor is None else tensor
