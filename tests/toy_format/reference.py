"""Decoding of the toy format."""

import torch
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.stack([weight & 15, weight >> 4], -1).flatten(1).float() - 8
    return (values * scale[:, None]).to(dtype)
