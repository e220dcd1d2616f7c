"""Decoding of signed bytes. The format is documented in `hf_pcdvq/codecs/scalar.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `formats.int8.Int8Weight`. Computes in float32, rounds once to `dtype`."""
    return (weight.view(torch.int8).float() * scale[:, None]).to(dtype)


def matmul(x: Tensor, weight: Tensor, scale: Tensor, transposed: bool) -> Tensor:
    """`x @ W.T`, or `x @ W` where `transposed`.

    Bytes are exact in every floating dtype, so that only the result, or `x`, needs scaling, which is done in float32.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    integers = weight.view(torch.int8).to(x.dtype)
    if transposed:
        return (x.to(compute) * scale).to(x.dtype) @ integers
    return ((x @ integers.T).to(compute) * scale).to(x.dtype)
