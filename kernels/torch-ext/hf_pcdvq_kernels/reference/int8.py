"""Decoding of signed bytes. The format is documented in `hf_pcdvq/codecs/scalar.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `formats.int8.Int8Weight`. Computes in float32, rounds once to `dtype`."""
    return (weight.view(torch.int8).float() * scale[:, None]).to(dtype)


def matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ W.T`. Bytes are exact in every floating-point dtype, so only the result is scaled, in float32."""
    out = functional.linear(x, weight.view(torch.int8).to(x.dtype))
    return (out.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)
