"""Decoding of the CCQ `stream` layout. The format is documented in `hf_pcdvq/codecs/stream.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..formats.stream import STREAM_MULTIPLIER, STREAM_RING, StreamLayout


def values(window_bits: int, device: torch.device, multiplier: int = STREAM_MULTIPLIER) -> torch.Tensor:
    """The value of every window, int32 `[2^window_bits]`: the product mod 2^32, its four signed bytes summed."""
    product = torch.arange(1 << window_bits, device=device, dtype=torch.int64) * multiplier
    shifts = torch.arange(0, 32, 8, device=device)
    unsigned = (product[:, None] >> shifts) & 0xFF
    return ((unsigned ^ 0x80) - 0x80).sum(1).to(torch.int32)


def words_before(weight: torch.Tensor, layout: StreamLayout) -> torch.Tensor:
    """For every word of `weight` the one before it in its ring, int32 `[words, K]`; for the first word, the last."""
    per_ring = STREAM_RING * layout.period_words // layout.period
    full = len(weight) // per_ring * per_ring
    rings = weight[:full].view(-1, per_ring, weight.shape[1]).roll(1, 1).flatten(0, 1)
    return torch.cat([rings, weight[full:].roll(1, 0)])


def windows(weight: torch.Tensor, layout: StreamLayout) -> Iterator[torch.Tensor]:
    """The windows of rows 0, 1, ... of every period, each int32 `[periods, K]`."""
    shape = (-1, layout.period_words, weight.shape[1])
    words, before = weight.view(shape), words_before(weight, layout).view(shape)
    mask = (1 << layout.window_bits) - 1
    for end in layout.ends:  # bit position after the window, counted from the top of the period's first word
        word, shift = (end - 1) // 32, -end % 32
        window = words[:, word] >> shift
        if shift + layout.window_bits > 32:
            window = window & ((1 << (32 - shift)) - 1) | before[:, word] << (32 - shift)
        yield window & mask


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, layout: StreamLayout, dtype: torch.dtype
) -> torch.Tensor:
    """See `formats.stream.StreamWeight`. Computes in float32, rounds once to `dtype`.

    Args:
        table: `values(layout.window_bits)` as float32. The format needs no table, but on a CPU a lookup is several
            times as fast as the arithmetic.
    """
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(scale.float(), (0, -len(scale) % layout.period)).view(-1, layout.period)
    out = torch.empty(len(padded), layout.period, columns, dtype=dtype, device=weight.device)
    for row, window in enumerate(windows(weight, layout)):
        value = table.index_select(0, window.flatten()).view(window.shape)
        out[:, row] = value.mul_(padded[:, row, None])
    return out.flatten(0, 1)[: len(scale)]
