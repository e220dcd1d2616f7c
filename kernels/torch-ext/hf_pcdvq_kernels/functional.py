"""The ops as functions: what they compute, shapes, dtypes, and what they raise.

`N` is the number of output features and `K` of input features throughout. A weight is given by the name of its family
(`"pcdvq"`, `"ccq"`, `"stream"`, `"int8"`: see `formats`) and its packed tensors, tables and numbers, in the order of
the arguments of the family's description, such as `formats.pcdvq.PcdvqWeight`. Packed tensors must be contiguous and lie
on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ._ops import OPS
from .backend import use_triton
from .formats import family_named, family_of

# An argument of an op beside the activations: a packed tensor, one that the format lacks, a table or a number.
PackedArgument: TypeAlias = Tensor | float | str | None


def hadamard(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """Rotate blocks of the last dimension: `y = H (signs * x) / sqrt(block)`, Sylvester order, block by block.

    Args:
        x: `[..., K]`, bfloat16, float16, float32 or float64; `K` a multiple of the block.
        signs: float32 `[block]` of +-1, `block` a power of two; the same for every block of `x`.
        inverse: apply the inverse, `signs * (H x) / sqrt(block)`.

    Returns:
        The rotated tensor in the shape and dtype of `x`; arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device or stride.
    """
    return OPS.hadamard(x, signs, inverse)


def prepare(x: Tensor, signs: Tensor | None, format: str) -> Tensor | None:
    """What the Triton kernels do to activations before any product with a weight, done once for several products.

    Args:
        x: `[..., K]`.
        signs: of a rotation, see `hadamard`, or None.
        format: of the weights, by name: `"pcdvq-2.25"`, `"ccq-2.5"`, `"stream-2.0"` and so on.

    Returns:
        An int32 buffer for the argument `prepared` of products with the same `x`, `signs` and format, whatever the number
        of output features; None where products would not read it: PyTorch computes them, or they have no kernel.

    Raises:
        ValueError: a wrong shape, device or stride, or an unknown format.
    """
    if not family_of(format).has_kernels or not use_triton(x.device, x.dtype):
        return None
    from .triton import product

    columns = x.shape[-1]
    if not columns or not product.reads_prepared(format, x.numel() // columns, columns, x.dtype):
        return None
    return OPS.prepare(x, signs, format)


def dequantize(family: str, packed: Sequence[PackedArgument], dtype: torch.dtype) -> Tensor:
    """Decode a packed weight to `[N, K]` of `dtype`.

    Args:
        family: of the weight's format.
        packed: the arguments of the family's description, in their order.
        dtype: floating dtype of the result; arithmetic is float32.

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
        family: of the weight's format.
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        packed: the arguments of the family's description, in their order.
        transposed: compute `x @ W` instead.
        signs: of a rotation, see `hadamard`. The product is then with the weight in the basis before that rotation:
            `hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`.
        prepared: what `prepare` made of the same `x` and `signs` for this format. Spares the product doing it.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown family or format, a wrong shape, device or stride.
    """
    return _op(family, "matmul")(x, *packed, transposed, signs, prepared)


def grouped_matmul(
    family: str, x: Tensor, experts: Tensor, packed: Sequence[PackedArgument], signs: Tensor | None = None
) -> Tensor:
    """`x[g] @ W[experts[g]].T` for every group `g` of tokens and a stack of weights `W`. Not differentiable.

    As one Triton kernel where there is one: 16-bit `x`, at most 64 tokens a group. Nothing then waits for the device.

    Args:
        family: of the weights' format.
        x: `[G, T, K]`, floating.
        experts: int32 `[G]`, which weight a group takes; the product of a group is zero where it is negative. Must be
            smaller than the number of weights, which is not checked on a GPU.
        packed: the arguments of the family's description, in their order, those that belong to one weight
            (`Argument.stacked`) stacked along a new first dimension. Tables are shared, and not stacked.
        signs: of a rotation, see `hadamard`: the product is then `hadamard(x[g]) @ W[experts[g]].T`.

    Returns:
        `[G, T, N]` in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown family or format, a wrong shape, device or stride.
    """
    return _op(family, "grouped_matmul")(x, experts, *packed, signs=signs)


def _op(family: str, name: str):
    family_named(family)  # an unknown one is refused by name
    return getattr(OPS, f"{family}_{name}")
