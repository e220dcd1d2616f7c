"""The ops as functions: what they compute, shapes, dtypes, and what they raise.

Throughout, `N` is the number of output features and `K` the number of input features. A weight is given by the name
of its family (`"pcdvq"`, `"ccq"`, `"stream"`, `"int8"`: see `formats`) and by its packed tensors, tables and scalars,
in the order of the arguments in the family's description, e.g. `formats.pcdvq.PcdvqWeight`. Packed tensors must be
contiguous and on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ._checks import check_prepare
from ._ops import OPS
from .backend import use_cpu, use_triton
from .direct import SHARED_TOKENS
from .formats import family_named, family_of

# An op argument other than the activations: a packed tensor (None if the format lacks it), a table or a scalar.
PackedArgument: TypeAlias = Tensor | float | str | None


def hadamard(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """Rotate blocks of the last dimension: `y = H (signs * x) / sqrt(block)`, Sylvester order, block by block.

    Args:
        x: `[..., K]`, bfloat16, float16, float32 or float64; `K` a multiple of `block`.
        signs: float32 `[block]` of +-1, `block` a power of two up to 2^16; the same for every block of `x`.
        inverse: apply the inverse, `signs * (H x) / sqrt(block)`.

    Returns:
        The rotated tensor, with the shape and dtype of `x`; arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device or stride.
    """
    return OPS.hadamard(x, signs, inverse)


def prepare(x: Tensor, signs: Tensor | None, format: str) -> Tensor | None:
    """Do once, for several products, what kernels do to activations before any product with a weight.

    Args:
        x: `[..., K]`.
        signs: the signs of the rotation, see `hadamard`, or None.
        format: name of the weights' format: `"pcdvq-2.25"`, `"ccq-2.5"`, `"stream-2.0"` and so on.

    Returns:
        An int32 buffer to pass as `prepared` to products with the same `x`, `signs` and format, whatever the number
        of output features; None if products would not read it, because PyTorch computes them or they have no kernel.

    Raises:
        TypeError: a dtype that the kernels do not take. ValueError: a wrong shape, device or stride, or an unknown format.
    """
    family = family_of(format)
    if family.on_cpu and use_cpu(x.device, x.dtype):
        return _prepare_on_cpu(x, signs, format)
    if not family.has_kernels or not use_triton(x.device, x.dtype):
        return None
    from .triton import product

    columns = x.shape[-1]
    if not columns or not product.reads_prepared(format, x.numel() // columns, columns, x.dtype):
        return None
    return OPS.prepare(x, signs, format)


def _prepare_on_cpu(x: Tensor, signs: Tensor | None, format: str) -> Tensor | None:
    # In a compiled graph every product prepares its own: the number of tokens decides, and need not be known there.
    if torch.compiler.is_compiling():
        return None
    from .cpu import launch

    if not x.numel():
        return None
    check_prepare(x, signs)
    tokens = x.numel() // x.shape[-1]
    if tokens > SHARED_TOKENS or not launch.takes(tokens, x.dtype):
        return None
    return OPS.prepare(x, signs, format)


def dequantize(family: str, packed: Sequence[PackedArgument], dtype: torch.dtype) -> Tensor:
    """Decode a packed weight to `[N, K]` of `dtype`.

    Args:
        family: family of the weight's format.
        packed: the arguments in the family's description, in that order.
        dtype: floating-point dtype of the result; arithmetic is float32.

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown family or format, a wrong shape, device or stride.
    """
    return _op(family, "dequantize")(*packed, dtype)


def matmul(
    family: str,
    x: Tensor,
    packed: Sequence[PackedArgument],
    transposed: bool = False,
    signs: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`x @ W.T` for the weight that `dequantize` decodes from the same arguments, differentiable in `x`.

    Args:
        family: family of the weight's format.
        x: `[..., K]` (`[..., N]` if `transposed`), floating-point; the weight is decoded to its dtype.
        packed: the arguments in the family's description, in that order.
        transposed: compute `x @ W` instead.
        signs: the signs of the rotation, see `hadamard`. The product is then with the weight in its original basis:
            `hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` if `transposed`.
        prepared: what `prepare` returned for the same `x`, `signs` and format; saves the product that step.

    Returns:
        `[..., N]` (`[..., K]` if `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown family or format, a wrong shape, device or stride.
    """
    return _op(family, "matmul")(x, *packed, transposed, signs, prepared)


def grouped_matmul(
    family: str, x: Tensor, experts: Tensor, packed: Sequence[PackedArgument], signs: Tensor | None = None
) -> Tensor:
    """`x[g] @ W[experts[g]].T` for every group `g` of tokens and a stack of weights `W`. Not differentiable.

    On a GPU it runs as one Triton kernel if there is one: 16-bit `x`, at most 64 tokens per group. The host then never
    synchronizes with the device. On a CPU it is one call of the compiled library, up to some tokens per
    group (`cpu.launch.MOST_TOKENS`).

    Args:
        family: family of the weights' format.
        x: `[G, T, K]`, floating-point.
        experts: int32 `[G]`, the index of each group's weight; if negative, the group's product is zero. So it is if
            the index is beyond the stack and a Triton kernel computes the product; otherwise that is an error.
        packed: the arguments in the family's description, in that order; those that belong to one weight
            (`Argument.stacked`) are stacked along a new first dimension. Tables are shared, not stacked.
        signs: the signs of the rotation, see `hadamard`: the product is then `hadamard(x[g]) @ W[experts[g]].T`.

    Returns:
        `[G, T, N]` in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown family or format, a wrong shape, device or stride.
    """
    return _op(family, "grouped_matmul")(x, experts, *packed, signs=signs)


def _op(family: str, name: str):
    family_named(family)  # an unknown one is refused by name
    return getattr(OPS, f"{family}_{name}")
