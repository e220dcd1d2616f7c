"""Tensors that Transformers has divided among processes (`DTensor`), without importing what defines them: it is slow."""

from __future__ import annotations

from torch import Tensor


def is_divided(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor, or the whole that it shares with others."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece. All processes that hold a part must call this."""
    return tensor.full_tensor() if is_divided(tensor) else tensor
