"""Validation of op arguments, shared by the implementations and their fakes. Raises, never asserts."""

from __future__ import annotations

import torch

from .formats import (
    CCQ_LAYOUTS,
    CODECS,
    GROUP,
    MAGNITUDE_BITS,
    SIGN_BITS,
    VECTOR,
    CcqLayout,
    StreamLayout,
    stream_layout,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, FLOATS))}, got {dtype}")


def check_tensor(
    op: str, name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """A packed tensor or table: exact dtype and shape, contiguous, on the device of the others."""
    if tensor is None:
        raise ValueError(f"{op}: {name} is required, got None")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} like the other arguments")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got stride {tensor.stride()}; call .contiguous()")


def check_none(op: str, name: str, tensor: torch.Tensor | None, why: str) -> None:
    if tensor is not None:
        raise ValueError(f"{op}: {name} must be None {why}, got a tensor of shape {list(tensor.shape)}")


def check_codes(op: str, weight: torch.Tensor, dtype: torch.dtype, multiple: int) -> None:
    if weight.ndim != 2 or weight.shape[1] % multiple or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: weight must be [N, words] with words a positive multiple of {multiple}, got {list(weight.shape)}"
        )
    check_tensor(op, "weight", weight, dtype, tuple(weight.shape), weight.device)


def check_input(op: str, x: torch.Tensor, weight: torch.Tensor, rows: int, columns: int, transposed: bool) -> None:
    check_float(op, "x", x.dtype)
    expected = rows if transposed else columns
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"{op}: the last dimension of x must be {expected} for a weight of {rows} x {columns}"
            f"{' (transposed)' if transposed else ''}, got {list(x.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}; move one of them")


def check_stack(op: str, stack: list[torch.Tensor | None]) -> None:
    """Packed tensors of several weights: one more dimension, the same number of weights in each."""
    experts = stack[0].shape[0] if stack[0].ndim == 3 else 0
    for tensor in stack:
        if tensor is not None and (not experts or tensor.shape[:1] != (experts,) or not tensor.is_contiguous()):
            raise ValueError(
                f"{op}: packed tensors must be contiguous stacks of as many weights, weight [E, N, words] and so on, got "
                f"{list(stack[0].shape)} and {list(tensor.shape)}"
            )


def check_groups(op: str, x: torch.Tensor, experts: torch.Tensor, columns: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be [G, T, {columns}], got {list(x.shape)}")
    check_tensor(op, "experts", experts, torch.int32, (x.shape[0],), x.device)


def check_signs(op: str, signs: torch.Tensor, columns: int, device: torch.device) -> None:
    """Signs of a rotation of `columns` numbers."""
    block = signs.numel()
    if block == 0 or block & (block - 1):
        raise ValueError(f"{op}: signs must have a power-of-two length, got {block}")
    check_tensor(op, "signs", signs, torch.float32, (block,), device)
    if columns % block:
        raise ValueError(f"{op}: {columns} numbers cannot be rotated in blocks of {block}, the length of signs")


def check_hadamard(x: torch.Tensor, signs: torch.Tensor) -> None:
    op = "hadamard"
    check_float(op, "x", x.dtype)
    check_signs(op, signs, 0, x.device)
    if x.ndim == 0 or x.shape[-1] % signs.numel():
        raise ValueError(
            f"{op}: the last dimension of x must be a multiple of the block of {signs.numel()}, got {list(x.shape)}"
        )


def check_codec(op: str, codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"{op}: codec must be one of {', '.join(CODECS)}, got {codec!r}")


def check_prepare(x: torch.Tensor, signs: torch.Tensor | None, codec: str) -> None:
    check_codec("prepare", codec)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"prepare: x must be float16 or bfloat16, got {x.dtype}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"prepare: x must be [..., K] and hold something, got {list(x.shape)}")
    if signs is not None:
        check_signs("prepare", signs, x.shape[-1], x.device)


def check_prepared(op: str, prepared: torch.Tensor, words: int, device: torch.device) -> None:
    """Activations prepared for another product than this are most often of another size."""
    check_tensor(op, "prepared", prepared, torch.int32, (words,), device)


def check_pcdvq(
    op: str,
    weight: torch.Tensor,
    magnitude: torch.Tensor | None,
    scale: torch.Tensor,
    patterns: torch.Tensor,
    levels: torch.Tensor,
) -> int:
    """Validate the packed tensors of a PCDVQ weight; returns its number of input features."""
    check_codes(op, weight, torch.int16, 1 if magnitude is None else 4)
    rows, vectors = weight.shape
    pattern_bits = 16 - SIGN_BITS - (MAGNITUDE_BITS if magnitude is None else 0)
    if magnitude is not None:
        check_tensor(op, "magnitude", magnitude, torch.uint8, (rows, vectors // 4), weight.device)
    check_tensor(op, "scale", scale, torch.float32, (rows,), weight.device)
    check_tensor(op, "patterns", patterns, torch.int8, (1 << pattern_bits, VECTOR), weight.device)
    check_tensor(op, "levels", levels, torch.float32, (1 << MAGNITUDE_BITS,), weight.device)
    return vectors * VECTOR


def ccq_layout(op: str, name: str) -> CcqLayout:
    if name not in CCQ_LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(map(repr, CCQ_LAYOUTS))}, got {name!r}")
    return CCQ_LAYOUTS[name]


def check_ccq(
    op: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    local_scale: torch.Tensor | None,
    code_scale: torch.Tensor | None,
    code_zero: torch.Tensor | None,
    layout: CcqLayout,
) -> int:
    """Validate the packed tensors of a CCQ weight; returns its number of input features."""
    check_codes(op, weight, layout.storage, layout.words)
    rows, groups = weight.shape[0], weight.shape[1] // layout.words
    check_tensor(op, "scale", scale, torch.float32, (rows,), weight.device)
    if layout.clustered:
        check_tensor(op, "local_scale", local_scale, torch.uint8, (rows, (groups + 1) // 2), weight.device)
        check_tensor(op, "code_scale", code_scale, torch.float32, (rows,), weight.device)
        check_tensor(op, "code_zero", code_zero, torch.float32, (rows,), weight.device)
    else:
        for name, tensor in (("local_scale", local_scale), ("code_scale", code_scale), ("code_zero", code_zero)):
            check_none(op, name, tensor, f"for layout {layout.name!r}")
    return groups * GROUP


def check_stream(op: str, weight: torch.Tensor, scale: torch.Tensor, bits: float, window: int) -> StreamLayout:
    """Validate the packed tensors of a CCQ weight in the stream layout."""
    try:
        layout = stream_layout(bits, window)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    if scale.ndim != 1 or len(scale) == 0:
        raise ValueError(f"{op}: scale must be [N], got {list(scale.shape)}")
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must be [words, K], got {list(weight.shape)}")
    check_tensor(op, "weight", weight, torch.int32, (layout.words(len(scale)), weight.shape[1]), weight.device)
    check_tensor(op, "scale", scale, torch.float32, (len(scale),), weight.device)
    return layout
