"""Decoding of the published CCQ layouts. The formats are documented in `hf_pcdvq/codecs/convolutional.py`."""

from __future__ import annotations

import torch

from ..formats.ccq import GROUP, CcqLayout


def windows(words: torch.Tensor, layout: CcqLayout) -> torch.Tensor:
    """The integer weights in code words: int32 `[..., words]` -> int32 `[..., words * len(shifts)]`."""
    shifts = torch.tensor(layout.shifts, device=words.device, dtype=torch.int32)
    values = (words[..., None] >> shifts) & ((1 << layout.window_bits) - 1)
    return values.flatten(-2) - layout.offset


def cluster_words(byte: torch.Tensor, code_scale: torch.Tensor, code_zero: torch.Tensor) -> torch.Tensor:
    """Code words of the `2.0625` layout: floor(byte * code_scale + code_zero + 0.5), all float32, as int32."""
    return torch.floor(byte.float() * code_scale + code_zero + 0.5).to(torch.int32)


def local_scales(local_scale: torch.Tensor, groups: int) -> torch.Tensor:
    """4-bit group scales: uint8 `[N, ceil(groups / 2)]`, even groups in the high nibble -> int32 `[N, groups]`."""
    byte = local_scale.to(torch.int32)
    return torch.stack([byte >> 4, byte & 0xF], -1).flatten(-2)[:, :groups]


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    local_scale: torch.Tensor | None,
    code_scale: torch.Tensor | None,
    code_zero: torch.Tensor | None,
    layout: CcqLayout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `formats.ccq.CcqWeight`. Computes in float32, rounds once to `dtype`."""
    rows = weight.shape[0]
    words = weight.reshape(rows, -1, layout.words)
    if layout.clustered:
        integer_scale = local_scales(local_scale, words.shape[1])
        words = cluster_words(words, code_scale[:, None, None], code_zero[:, None, None])
    else:
        words = words.to(torch.int32)
        integer_scale = words[..., -1] & layout.max_scale
    values = windows(words, layout)[..., :GROUP].float()
    group_scale = integer_scale.float() * scale.float()[:, None]
    return (group_scale[..., None] * values).reshape(rows, -1).to(dtype)
