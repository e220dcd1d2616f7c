"""The bytes of tensors, and hashes of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from .headers import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def byte_view(tensor: Tensor) -> Tensor:
    """The contents of a tensor, uint8 `[bytes]` on the CPU; shares the memory of a contiguous tensor there."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def tensor_hash(tensor: Tensor) -> str:
    """XXH3 (128 bits) of a tensor's dtype, shape and bytes, in hexadecimal."""
    return content_hash(tensor.dtype, tuple(tensor.shape), memoryview(byte_view(tensor).numpy()))


def content_hash(dtype: torch.dtype | str, shape: tuple[int, ...], content: memoryview) -> str:
    """`tensor_hash` of the tensor that these bytes are; `dtype` may be its name in a safetensors header."""
    name = dtype if isinstance(dtype, str) else _NAMES.get(dtype, str(dtype))
    digest = xxhash.xxh3_128(f"{name} {list(shape)} ".encode())
    digest.update(content)
    return digest.hexdigest()


def model_hash(hashes: Mapping[str, str]) -> str:
    """A hash of all tensors of a model, from theirs by name."""
    digest = xxhash.xxh3_128()
    for name, text in sorted(hashes.items()):
        digest.update(f"{name} {text}\n".encode())
    return digest.hexdigest()
