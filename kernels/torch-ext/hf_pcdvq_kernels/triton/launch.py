"""What the ops call: allocates results, chooses kernels and launches them. A given shape always takes the same path.

Nothing here synchronizes with the device, so a product can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..formats import Decode, PackedWeight
from ..reference.sliced import sliced_dequantize, sliced_matmul
from . import activations
from .device import OPTIONS, current, has_ptx
from .launch_config import kernels_of
from .launcher import launcher
from .product import has_kernel, product

# Weights decoded at a time when PyTorch multiplies: 128 MiB of 16-bit floats, enough for a GPU's matrix product.
SLICE = 1 << 26
TILE_ROWS, TILE_COLUMNS = 16, 128
# Groups of a grouped product lie along the third axis of the grid, which CUDA limits.
MOST_GROUPS = 65535


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]`, bit-identical to the reference."""
    decode = _rows(weight, dtype)
    return sliced_dequantize(
        weight.rows, weight.columns, decode, dtype, weight.weight.device, weight.row_multiple, SLICE
    )


def matmul(
    x: Tensor, weight: PackedWeight, transposed: bool, signs: Tensor | None, prepared: Tensor | None = None
) -> Tensor:
    """`hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` if `transposed`; without `signs` nothing is rotated.

    `prepared` is the result of `prepare` for `x`; a product without a kernel does not read it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not transposed and has_kernel(weight, len(flat), x.dtype):
        shape = (*x.shape[:-1], weight.rows)
        return product(flat.contiguous()[None], weight, signs, prepared=prepared, shape_of_result=shape)
    if signs is not None and not transposed:
        x = hadamard(x, signs, False)
    decode = _rows(weight, x.dtype)
    out = sliced_matmul(x, weight.rows, weight.columns, decode, transposed, weight.row_multiple, SLICE)
    return hadamard(out, signs, True) if signs is not None and transposed else out


def grouped_matmul(
    x: Tensor, experts: Tensor, first: PackedWeight, stack: int, signs: Tensor | None
) -> Tensor | None:
    """The product of every `x[g]` with weight `experts[g]` of a stack; None if no kernel supports it.

    Args:
        x: `[G, T, K]`.
        experts: int32 `[G]`; the product is zero if it is outside the stack.
        first: the first weight of the stack; its tensors start where those of the stack do.
        stack: the number of weights in the stack.
    """
    if not len(x) or not has_kernel(first, x.shape[1], x.dtype):
        return None
    parts = zip(x.contiguous().split(MOST_GROUPS), experts.split(MOST_GROUPS), strict=True)
    products = [product(part, first, signs, experts=mine, stack=stack) for part, mine in parts]
    return products[0] if len(products) == 1 else torch.cat(products)


def hadamard(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """See `hf_pcdvq_kernels.hadamard`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    block = len(signs)
    tile = max(activations.TILE, block)
    with current(x.device):
        sizes, constants = {"numbers": x.numel()}, {"INVERSE": inverse, "BLOCK": block, "TILE": tile}
        grid = (triton.cdiv(x.numel(), tile),)
        launcher(activations.hadamard_kernel, grid, x.device, sizes, constants, OPTIONS)(x, signs, out)
    return out


def _rows(weight: PackedWeight, dtype: torch.dtype) -> Decode:
    """`decode(start, stop)` for the rows of a weight."""
    kernels = kernels_of(weight.name)
    operands, constants = kernels.operands(weight), kernels.constants(weight)

    def decode(start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, weight.columns, dtype=dtype, device=weight.weight.device)
        grid = triton.cdiv(len(out), TILE_ROWS), triton.cdiv(weight.columns, TILE_COLUMNS)
        with current(out.device):
            kernels.dequantize_kernel[grid](
                p_out=out,
                **operands,
                first=start,
                stop=stop,
                **kernels.dequantize_sizes(weight),
                **constants,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                PTX=has_ptx(out.device),
                **OPTIONS,
            )
        return out

    return decode
