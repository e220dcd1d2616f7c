"""Every op, declared once: schema, fake implementation, reference implementation, derivative.

A faster backend registers itself for its device with `torch.library.impl(name, "cuda", function)`; everything else
(autograd, `torch.compile`, validation of the fakes) stays as it is here. `N` is the number of output features and
`K` of input features throughout; packed tensors must be contiguous and lie on one device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _checks as checks
from .formats import STREAM_RING, CcqLayout, StreamLayout
from .reference import ccq, pcdvq, sliced, stream
from .reference import hadamard as hadamard_reference

NAMESPACE = "hf_pcdvq_kernels"

_PCDVQ = "Tensor weight, Tensor? magnitude, Tensor scale, Tensor patterns, Tensor levels"
_CCQ = "Tensor weight, Tensor scale, Tensor? local_scale, Tensor? code_scale, Tensor? code_zero, str layout"
_STREAM = "Tensor weight, Tensor scale, float bits, int window"

torch.library.define(f"{NAMESPACE}::hadamard", "(Tensor x, Tensor signs, bool inverse=False) -> Tensor")
torch.library.define(f"{NAMESPACE}::pcdvq_dequantize", f"({_PCDVQ}, ScalarType dtype) -> Tensor")
torch.library.define(f"{NAMESPACE}::pcdvq_matmul", f"(Tensor x, {_PCDVQ}, bool transposed=False) -> Tensor")
torch.library.define(f"{NAMESPACE}::ccq_dequantize", f"({_CCQ}, ScalarType dtype) -> Tensor")
torch.library.define(f"{NAMESPACE}::ccq_matmul", f"(Tensor x, {_CCQ}, bool transposed=False) -> Tensor")
torch.library.define(f"{NAMESPACE}::stream_dequantize", f"({_STREAM}, ScalarType dtype) -> Tensor")
torch.library.define(f"{NAMESPACE}::stream_matmul", f"(Tensor x, {_STREAM}, bool transposed=False) -> Tensor")


def _matmul_shape(x: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else rows)


# ------------------------------------------------------------------------------------------------ hadamard


@torch.library.register_fake(f"{NAMESPACE}::hadamard")
def _(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    checks.check_hadamard(x, signs)
    return x.new_empty(x.shape)


@torch.library.impl(f"{NAMESPACE}::hadamard", "default")
def _(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    checks.check_hadamard(x, signs)
    return hadamard_reference.hadamard(x, signs, inverse)


def _hadamard_setup(ctx, inputs, output):
    _, signs, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx, grad):
    return hadamard(grad, ctx.saved_tensors[0], not ctx.inverse), None, None


torch.library.register_autograd(f"{NAMESPACE}::hadamard", _hadamard_backward, setup_context=_hadamard_setup)


# --------------------------------------------------------------------------------------------------- pcdvq


def _pcdvq_rows(weight, magnitude, scale, patterns, levels, dtype) -> Callable[[int, int], Tensor]:
    def decode(start: int, stop: int) -> Tensor:
        high = None if magnitude is None else magnitude[start:stop]
        return pcdvq.dequantize(weight[start:stop], high, scale[start:stop], patterns, levels, dtype)

    return decode


@torch.library.register_fake(f"{NAMESPACE}::pcdvq_dequantize")
def _(weight, magnitude, scale, patterns, levels, dtype):
    checks.check_float("pcdvq_dequantize", "dtype", dtype)
    columns = checks.check_pcdvq("pcdvq_dequantize", weight, magnitude, scale, patterns, levels)
    return weight.new_empty(weight.shape[0], columns, dtype=dtype)


@torch.library.impl(f"{NAMESPACE}::pcdvq_dequantize", "default")
def _(weight, magnitude, scale, patterns, levels, dtype):
    checks.check_float("pcdvq_dequantize", "dtype", dtype)
    columns = checks.check_pcdvq("pcdvq_dequantize", weight, magnitude, scale, patterns, levels)
    decode = _pcdvq_rows(weight, magnitude, scale, patterns, levels, dtype)
    return sliced.sliced_dequantize(weight.shape[0], columns, decode, dtype, weight.device)


@torch.library.register_fake(f"{NAMESPACE}::pcdvq_matmul")
def _(x, weight, magnitude, scale, patterns, levels, transposed=False):
    columns = checks.check_pcdvq("pcdvq_matmul", weight, magnitude, scale, patterns, levels)
    checks.check_input("pcdvq_matmul", x, weight, weight.shape[0], columns, transposed)
    return _matmul_shape(x, weight.shape[0], columns, transposed)


@torch.library.impl(f"{NAMESPACE}::pcdvq_matmul", "default")
def _(x, weight, magnitude, scale, patterns, levels, transposed=False):
    columns = checks.check_pcdvq("pcdvq_matmul", weight, magnitude, scale, patterns, levels)
    checks.check_input("pcdvq_matmul", x, weight, weight.shape[0], columns, transposed)
    decode = _pcdvq_rows(weight, magnitude, scale, patterns, levels, x.dtype)
    return sliced.sliced_matmul(x, weight.shape[0], columns, decode, transposed)


# ----------------------------------------------------------------------------------------------------- ccq


def _ccq_rows(packed: tuple[Tensor | None, ...], form: CcqLayout, dtype) -> Callable[[int, int], Tensor]:
    def decode(start: int, stop: int) -> Tensor:
        rows = [None if tensor is None else tensor[start:stop] for tensor in packed]
        return ccq.dequantize(*rows, form, dtype)

    return decode


@torch.library.register_fake(f"{NAMESPACE}::ccq_dequantize")
def _(weight, scale, local_scale, code_scale, code_zero, layout, dtype):
    checks.check_float("ccq_dequantize", "dtype", dtype)
    form = checks.ccq_layout("ccq_dequantize", layout)
    columns = checks.check_ccq("ccq_dequantize", weight, scale, local_scale, code_scale, code_zero, form)
    return weight.new_empty(weight.shape[0], columns, dtype=dtype)


@torch.library.impl(f"{NAMESPACE}::ccq_dequantize", "default")
def _(weight, scale, local_scale, code_scale, code_zero, layout, dtype):
    checks.check_float("ccq_dequantize", "dtype", dtype)
    form = checks.ccq_layout("ccq_dequantize", layout)
    columns = checks.check_ccq("ccq_dequantize", weight, scale, local_scale, code_scale, code_zero, form)
    decode = _ccq_rows((weight, scale, local_scale, code_scale, code_zero), form, dtype)
    return sliced.sliced_dequantize(weight.shape[0], columns, decode, dtype, weight.device)


@torch.library.register_fake(f"{NAMESPACE}::ccq_matmul")
def _(x, weight, scale, local_scale, code_scale, code_zero, layout, transposed=False):
    form = checks.ccq_layout("ccq_matmul", layout)
    columns = checks.check_ccq("ccq_matmul", weight, scale, local_scale, code_scale, code_zero, form)
    checks.check_input("ccq_matmul", x, weight, weight.shape[0], columns, transposed)
    return _matmul_shape(x, weight.shape[0], columns, transposed)


@torch.library.impl(f"{NAMESPACE}::ccq_matmul", "default")
def _(x, weight, scale, local_scale, code_scale, code_zero, layout, transposed=False):
    form = checks.ccq_layout("ccq_matmul", layout)
    columns = checks.check_ccq("ccq_matmul", weight, scale, local_scale, code_scale, code_zero, form)
    checks.check_input("ccq_matmul", x, weight, weight.shape[0], columns, transposed)
    decode = _ccq_rows((weight, scale, local_scale, code_scale, code_zero), form, x.dtype)
    return sliced.sliced_matmul(x, weight.shape[0], columns, decode, transposed)


# -------------------------------------------------------------------------------------------------- stream


def _stream_rows(weight: Tensor, scale: Tensor, layout: StreamLayout, dtype) -> Callable[[int, int], Tensor]:
    table = stream.values(layout.window, weight.device).float()

    def decode(start: int, stop: int) -> Tensor:
        first = start // layout.period * layout.period_words
        words = weight[first : first + layout.words(stop - start)]
        return stream.dequantize(words, scale[start:stop], table, layout, dtype)

    return decode


@torch.library.register_fake(f"{NAMESPACE}::stream_dequantize")
def _(weight, scale, bits, window, dtype):
    checks.check_float("stream_dequantize", "dtype", dtype)
    checks.check_stream("stream_dequantize", weight, scale, bits, window)
    return weight.new_empty(scale.shape[0], weight.shape[1], dtype=dtype)


@torch.library.impl(f"{NAMESPACE}::stream_dequantize", "default")
def _(weight, scale, bits, window, dtype):
    checks.check_float("stream_dequantize", "dtype", dtype)
    layout = checks.check_stream("stream_dequantize", weight, scale, bits, window)
    decode = _stream_rows(weight, scale, layout, dtype)
    return sliced.sliced_dequantize(scale.shape[0], weight.shape[1], decode, dtype, weight.device, STREAM_RING)


@torch.library.register_fake(f"{NAMESPACE}::stream_matmul")
def _(x, weight, scale, bits, window, transposed=False):
    checks.check_stream("stream_matmul", weight, scale, bits, window)
    checks.check_input("stream_matmul", x, weight, scale.shape[0], weight.shape[1], transposed)
    return _matmul_shape(x, scale.shape[0], weight.shape[1], transposed)


@torch.library.impl(f"{NAMESPACE}::stream_matmul", "default")
def _(x, weight, scale, bits, window, transposed=False):
    layout = checks.check_stream("stream_matmul", weight, scale, bits, window)
    checks.check_input("stream_matmul", x, weight, scale.shape[0], weight.shape[1], transposed)
    decode = _stream_rows(weight, scale, layout, x.dtype)
    return sliced.sliced_matmul(x, scale.shape[0], weight.shape[1], decode, transposed, STREAM_RING)


def _register_matmul_autograd(name: str) -> None:
    """The derivative in `x` of `x @ W.T` is `grad @ W`, which is the same op transposed; codes have none."""
    op = getattr(getattr(torch.ops, NAMESPACE), name)

    def setup_context(ctx, inputs, output):
        _, *packed, ctx.transposed = inputs
        ctx.plain = [None if isinstance(item, Tensor) else item for item in packed]
        ctx.is_tensor = [isinstance(item, Tensor) for item in packed]
        ctx.save_for_backward(*(item for item in packed if isinstance(item, Tensor)))

    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        packed = [next(saved) if tensor else item for tensor, item in zip(ctx.is_tensor, ctx.plain)]
        return op(grad, *packed, not ctx.transposed), *(None for _ in packed), None

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)


_register_matmul_autograd("pcdvq_matmul")
_register_matmul_autograd("ccq_matmul")
_register_matmul_autograd("stream_matmul")


# ------------------------------------------------------------------------------------------- public functions


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
    return torch.ops.hf_pcdvq_kernels.hadamard(x, signs, inverse)


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
    return torch.ops.hf_pcdvq_kernels.pcdvq_dequantize(weight, magnitude, scale, patterns, levels, dtype)


def pcdvq_matmul(
    x: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    scale: Tensor,
    patterns: Tensor,
    levels: Tensor,
    transposed: bool = False,
) -> Tensor:
    """`x @ W.T` for the weight that `pcdvq_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device or stride.
    """
    return torch.ops.hf_pcdvq_kernels.pcdvq_matmul(x, weight, magnitude, scale, patterns, levels, transposed)


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
    return torch.ops.hf_pcdvq_kernels.ccq_dequantize(weight, scale, local_scale, code_scale, code_zero, layout, dtype)


def ccq_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    local_scale: Tensor | None,
    code_scale: Tensor | None,
    code_zero: Tensor | None,
    layout: str,
    transposed: bool = False,
) -> Tensor:
    """`x @ W.T` for the weight that `ccq_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong layout, shape, device or stride.
    """
    return torch.ops.hf_pcdvq_kernels.ccq_matmul(
        x, weight, scale, local_scale, code_scale, code_zero, layout, transposed
    )


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
    return torch.ops.hf_pcdvq_kernels.stream_dequantize(weight, scale, bits, window, dtype)


def stream_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, bits: float, window: int, transposed: bool = False
) -> Tensor:
    """`x @ W.T` for the weight that `stream_dequantize` decodes from the same tensors, differentiable in `x`.

    Args:
        x: `[..., K]` (`[..., N]` where `transposed`), floating; the weight is decoded in its dtype.
        transposed: compute `x @ W` instead.

    Returns:
        `[..., N]` (`[..., K]` where `transposed`) in the dtype of `x`.

    Raises:
        TypeError: a wrong dtype. ValueError: wrong bits, window, shape, device or stride.
    """
    return torch.ops.hf_pcdvq_kernels.stream_matmul(x, weight, scale, bits, window, transposed)
