"""How the tokens that a router sends to experts are arranged for `grouped_matmul`."""

from __future__ import annotations

import torch
from torch import Tensor

_SINGLE_PAIRS = 64  # up to this many (token, expert) pairs, each is a tile of its own
_TILES = (16, 64)  # pairs per tile if there are more


def tiles_of_tokens(index: Tensor, number: int) -> tuple[Tensor, Tensor, int]:
    """Sort (token, expert) pairs into tiles of one expert each, for kernels that multiply tile by tile.

    If there are few pairs, each is its own tile. Otherwise the pairs of an expert fill tiles of 16 or 64, the last
    one partially; the number of tiles is the largest that any routing could need, so it does not depend on the data.

    Args:
        index: the expert of every pair, integer `[S]`; pairs whose index is out of range go to tiles of no expert.
        number: number of experts.

    Returns:
        The expert of every tile, int32 `[G]`, -1 for none; the position of every pair among the slots of all tiles,
        int64 `[S]`; and the number of slots per tile.
    """
    index = torch.where(
        (index >= 0) & (index < number), index, number
    )  # experts of other devices are counted as one extra expert
    pairs = len(index)
    if pairs <= _SINGLE_PAIRS:
        experts = torch.where(index < number, index, -1).to(torch.int32)
        return experts, torch.arange(pairs, device=index.device), 1
    size = _TILES[0] if pairs <= _TILES[0] * number else _TILES[1]
    order = index.argsort(stable=True)
    count = torch.zeros(number + 1, dtype=torch.int64, device=index.device).scatter_add_(
        0, index, torch.ones_like(index)
    )
    needed = -(-count // size)
    first_tile, first_pair = needed.cumsum(0) - needed, count.cumsum(0) - count
    sorted_index = index[order]
    position = torch.arange(pairs, device=index.device) - first_pair[sorted_index]
    tile = first_tile[sorted_index] + position // size
    place = torch.empty_like(order)
    place[order] = tile * size + position % size
    experts = torch.full((pairs // size + number + 1,), -1, dtype=torch.int32, device=index.device)
    experts[tile] = torch.where(sorted_index < number, sorted_index, -1).to(torch.int32)
    return experts, place, size
