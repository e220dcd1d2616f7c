"""The ops as functions: what they compute, shapes, dtypes, and what they raise.

`N` is the number of output features and `K` of input features throughout; packed tensors must be contiguous and lie on one
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_codec
from ._ops import OPS
from .backend import use_triton


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


def prepare(x: Tensor, signs: Tensor | None, codec: str) -> Tensor | None:
    """What the Triton kernels do to activations before any product with a weight, done once for several products.

    Args:
        x: `[..., K]`.
        signs: of a rotation, see `hadamard`, or None.
        codec: the format of the weights: `"pcdvq 2.25"`, `"ccq 2.5"`, `"stream 2.0"` and so on.

    Returns:
        An int32 buffer for the argument `prepared` of products with the same `x`, `signs` and format, whatever the number
        of output features; None where products would not read it: PyTorch computes them, or they have no kernel.

    Raises:
        ValueError: a wrong shape, device or stride, or a format that there is not.
    """
    check_codec("prepare", codec)
    if not use_triton(x.device, x.dtype):
        return None
    from .triton import launch

    columns = x.shape[-1]
    if not columns or not launch.reads_prepared(codec, x.numel() // columns, columns, x.dtype):
        return None
    return OPS.prepare(x, signs, codec)


def pcdvq_dequantize(
    weight: Tensor,
    magnitude: Tensor | None,
    scale: Tensor,
    patterns: Tensor,
    levels: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a PCDVQ weight to `[N, K]` of `dtype` (arXiv 2506.05432, section 3; layout in `codecs/polar.py`).

    Args:
        weight: int16 `[N, K/8]`, one word per 8-vector.
        magnitude: uint8 `[N, K/32]`, the 2-bit magnitudes of four vectors a byte, or None where the words hold them.
        scale: float32 `[N]`, standard deviation of each rotated row.
        patterns: int8 `[512, 8]` with `magnitude`, `[128, 8]` without; non-negative, of norm about 127.
        levels: float32 `[4]`, magnitudes divided by 127, in units of the row's standard deviation.
        dtype: floating dtype of the result; arithmetic is float32.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device or stride.
    """
    return OPS.pcdvq_dequantize(weight, magnitude, scale, patterns, levels, dtype)


def pcdvq_matmul(
    x: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    scale: Tensor,
    patterns: Tensor,
    levels: Tensor,
    transposed: bool = False,
    signs: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`x @ W.T` for the weight that `pcdvq_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.
        signs: of a rotation, see `hadamard`. The product is then with the weight in the basis before that rotation:
            `hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`.
        prepared: what `prepare` made of the same `x` and `signs` for this format. Spares the product doing it.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device or stride.
    """
    return OPS.pcdvq_matmul(x, weight, magnitude, scale, patterns, levels, transposed, signs, prepared)


def ccq_dequantize(
    weight: Tensor,
    scale: Tensor,
    local_scale: Tensor | None,
    code_scale: Tensor | None,
    code_zero: Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a CCQ weight to `[N, K]` of `dtype` (arXiv 2507.07145; layouts in `codecs/convolutional.py`).

    Args:
        weight: uint8 `[N, K/64*22]` (`"2.75"`), int16 `[N, K/64*10]` (`"2.5"`) or uint8 `[N, K/4]` (`"2.0625"`).
        scale: float32 `[N]`, the super scale of each channel.
        local_scale: uint8 `[N, ceil(K/128)]`, 4-bit group scales, even groups in the high nibble; `"2.0625"` only.
        code_scale: float32 `[N]`, slope of the map from byte to code word; `"2.0625"` only.
        code_zero: float32 `[N]`, its offset; `"2.0625"` only.
        layout: `"2.75"`, `"2.5"` or `"2.0625"`.
        dtype: floating dtype of the result; arithmetic is float32.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong layout, shape, device or stride.
    """
    return OPS.ccq_dequantize(weight, scale, local_scale, code_scale, code_zero, layout, dtype)


def ccq_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    local_scale: Tensor | None,
    code_scale: Tensor | None,
    code_zero: Tensor | None,
    layout: str,
    transposed: bool = False,
    signs: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`x @ W.T` for the weight that `ccq_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.
        signs: of a rotation, see `hadamard`. The product is then with the weight in the basis before that rotation:
            `hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`.
        prepared: what `prepare` made of the same `x` and `signs` for this format. Spares the product doing it.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong layout, shape, device or stride.
    """
    return OPS.ccq_matmul(x, weight, scale, local_scale, code_scale, code_zero, layout, transposed, signs, prepared)


def stream_dequantize(weight: Tensor, scale: Tensor, bits: float, window: int, dtype: torch.dtype) -> Tensor:
    """Decode a CCQ weight in the stream layout to `[N, K]` of `dtype` (layout in `codecs/stream.py`).

    Args:
        weight: int32 `[words, K]`, the bits of the output channels for every input.
        scale: float32 `[N]`, of each output channel.
        bits: 2.0, 2.25, 2.5, 3.0 or 4.0 per weight.
        window: bits per window, 12 to 16.
        dtype: floating dtype of the result; arithmetic is float32.

    Raises:
        TypeError: a wrong dtype. ValueError: wrong bits, window, shape, device or stride.
    """
    return OPS.stream_dequantize(weight, scale, bits, window, dtype)


def stream_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bits: float,
    window: int,
    transposed: bool = False,
    signs: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`x @ W.T` for the weight that `stream_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.
        signs: of a rotation, see `hadamard`. The product is then with the weight in the basis before that rotation:
            `hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`.
        prepared: what `prepare` made of the same `x` and `signs` for this format. Spares the product doing it.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: wrong bits, window, shape, device or stride.
    """
    return OPS.stream_matmul(x, weight, scale, bits, window, transposed, signs, prepared)


def grouped_matmul(
    method: str, x: Tensor, experts: Tensor, packed: list[Tensor | float | str | None], signs: Tensor | None = None
) -> Tensor:
    """`x[g] @ W[experts[g]].T` for every group `g` of tokens and a stack of weights `W`. Not differentiable.

    As one Triton kernel where there is one: 16-bit `x`, at most 64 tokens a group. Nothing then waits for the device.

    Args:
        method: `"pcdvq"`, `"ccq"` or `"stream"`.
        x: `[G, T, K]`, floating.
        experts: int32 `[G]`, which weight a group takes; the product of a group is zero where it is negative. Must be
            smaller than the number of weights, which is not checked on a GPU.
        packed: the other arguments of `<method>_matmul`, in their order, the packed tensors of each weight stacked along a
            new first dimension. `patterns` and `levels` are shared, and not stacked.
        signs: of a rotation, see `hadamard`: the product is then `hadamard(x[g]) @ W[experts[g]].T`.

    Returns:
        `[G, T, N]` in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong method, shape, device or stride.
    """
    if method not in ("pcdvq", "ccq", "stream"):
        raise ValueError(f"grouped_matmul: method must be 'pcdvq', 'ccq' or 'stream', got {method!r}")
    return getattr(OPS, f"{method}_grouped_matmul")(x, experts, *packed, signs=signs)
