"""Decoding of whole weights, and products with them, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sliced import sliced_dequantize, sliced_matmul

if TYPE_CHECKING:
    from ..formats import PackedWeight

# Weights decoded at a time, unless the layout's row multiple forces larger slices. Decoding needs about 20 bytes of
# temporaries per weight, so a slice stays near 20 MiB however large the layer is, yet is large enough to keep a CPU's
# matrix product busy.
SLICE = 1 << 20


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]`."""
    decode = weight.reference_rows(dtype)
    shape = weight.rows, weight.columns
    return sliced_dequantize(*shape, decode, dtype, weight.weight.device, weight.row_multiple, SLICE)


def decoded_matmul(x: Tensor, weight: PackedWeight, transposed: bool) -> Tensor:
    """`x @ W.T`, or `x @ W` if `transposed`, with the weight decoded to the dtype of `x`, slice by slice."""
    decode = weight.reference_rows(x.dtype)
    return sliced_matmul(x, weight.rows, weight.columns, decode, transposed, weight.row_multiple, SLICE)
