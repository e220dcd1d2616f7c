"""Decoding of PCDVQ codes. The format is documented in `hf_pcdvq/codecs/polar.py`."""

from __future__ import annotations

import torch

from ..formats.pcdvq import MAGNITUDE_BITS, SIGN_BITS, VECTOR


def _bits(words: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Split each integer into `count` fields of `width` bits, lowest first: `[..., n]` -> `[..., n, count]`."""
    shifts = torch.arange(0, width * count, width, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts) & ((1 << width) - 1)


def sign_table(device: torch.device) -> torch.Tensor:
    """The eight signs for every value of sign bits 0-6: +-1, float32 `[128, 8]`."""
    negative = _bits(torch.arange(1 << SIGN_BITS, device=device, dtype=torch.int32), 1, SIGN_BITS)
    parity = negative.sum(-1, keepdim=True, dtype=torch.int32) & 1
    return (1 - 2 * torch.cat([negative, parity], -1)).float()


def dequantize(
    weight: torch.Tensor,
    magnitude: torch.Tensor | None,
    scale: torch.Tensor,
    patterns: torch.Tensor,
    levels: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `formats.pcdvq.PcdvqWeight`. Computes in float32, rounds once to `dtype`."""
    rows, vectors = weight.shape
    words = weight.to(torch.int32)
    index = (words >> SIGN_BITS) & (patterns.shape[0] - 1)
    if magnitude is None:
        level = (words >> (16 - MAGNITUDE_BITS)) & 3
    else:
        level = _bits(magnitude.to(torch.int32), MAGNITUDE_BITS, 4).reshape(rows, -1)

    factor = scale.float()[:, None] * levels.float()[level]
    # Both lookups take rows of small tables, on a CPU many times as fast as unpacking every sign bit of every vector.
    # As integers, which have no negative zero.
    vector = patterns.index_select(0, index.flatten())
    vector *= sign_table(weight.device).to(torch.int8).index_select(0, (words & ((1 << SIGN_BITS) - 1)).flatten())
    vector = vector.float()
    vector *= factor.reshape(-1, 1)
    return vector.reshape(rows, vectors * VECTOR).to(dtype)
