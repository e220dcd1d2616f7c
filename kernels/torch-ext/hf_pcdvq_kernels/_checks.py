"""Validation of op arguments, shared by the implementations and their fakes. Raises, never asserts."""

from __future__ import annotations

import torch

MAX_BLOCK = 1 << 16  # of a rotation: the kernels have 16 steps
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, FLOATS))}, got {dtype}")


def check_tensor(
    op: str, name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Check a packed tensor or table: exact dtype and shape, contiguous, on the same device as the others."""
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


def check_words(op: str, weight: torch.Tensor, multiple: int) -> None:
    if weight.ndim != 2 or weight.shape[1] % multiple or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: weight must have two dimensions, the second a positive multiple of {multiple}, got {list(weight.shape)}"
        )


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
    """Check stacks of packed tensors: an extra leading dimension, of the same size in all of them."""
    experts = stack[0].shape[0] if stack[0].ndim == 3 else 0
    for tensor in stack:
        if tensor is not None and (not experts or tensor.shape[:1] != (experts,) or not tensor.is_contiguous()):
            raise ValueError(
                f"{op}: packed tensors must be contiguous stacks of equal length (weight [E, N, words] etc.), got "
                f"{list(stack[0].shape)} and {list(tensor.shape)}"
            )


def check_groups(op: str, x: torch.Tensor, experts: torch.Tensor, columns: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be [G, T, {columns}], got {list(x.shape)}")
    check_tensor(op, "experts", experts, torch.int32, (x.shape[0],), x.device)


def check_experts(op: str, experts: torch.Tensor, number: int) -> None:
    """Check that no index is beyond a stack of `number` weights. Reads the indices, which waits for the device."""
    for group, expert in enumerate(experts.tolist()):
        if expert >= number:
            raise ValueError(f"{op}: experts[{group}] is {expert}, but the stack has {number} weights")


def check_signs(op: str, signs: torch.Tensor, columns: int, device: torch.device) -> None:
    """Check the signs of a rotation of `columns` values."""
    block = signs.numel()
    if block == 0 or block & (block - 1):
        raise ValueError(f"{op}: signs must have a power-of-two length, got {block}")
    if block > MAX_BLOCK:
        raise ValueError(f"{op}: signs must have a length of at most {MAX_BLOCK}, got {block}")
    check_tensor(op, "signs", signs, torch.float32, (block,), device)
    if columns % block:
        raise ValueError(f"{op}: {columns} values cannot be rotated in blocks of {block}, the length of signs")


def check_hadamard(x: torch.Tensor, signs: torch.Tensor) -> None:
    op = "hadamard"
    check_float(op, "x", x.dtype)
    check_signs(op, signs, 0, x.device)
    if x.ndim == 0 or x.shape[-1] % signs.numel():
        raise ValueError(
            f"{op}: the last dimension of x must be a multiple of the block of {signs.numel()}, got {list(x.shape)}"
        )


def check_prepare(x: torch.Tensor, signs: torch.Tensor | None) -> None:
    allowed = (torch.float16, torch.bfloat16, *([torch.float32] if x.device.type == "cpu" else []))
    if x.dtype not in allowed:
        raise TypeError(f"prepare: x must be one of {', '.join(map(str, allowed))}, got {x.dtype}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"prepare: x must be [..., K] and not empty, got {list(x.shape)}")
    if signs is not None:
        check_signs("prepare", signs, x.shape[-1], x.device)


def check_prepared(op: str, prepared: torch.Tensor, words: int, device: torch.device) -> None:
    """Check the size of prepared activations: those prepared for a different product usually differ in size."""
    check_tensor(op, "prepared", prepared, torch.int32, (words,), device)
