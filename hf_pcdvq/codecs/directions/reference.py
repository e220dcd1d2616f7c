"""The search for the nearest direction in PyTorch, which is the reference."""

from __future__ import annotations

import torch
from hf_pcdvq_kernels.formats.pcdvq import SIGN_BITS, VECTOR
from torch import Tensor

# Vectors scored against all patterns at a time: 2 MiB of scores for 512 patterns, which stays in a core's cache and
# is 2.4 times as fast on a CPU as chunks of 16384.
_CHUNK = {"cpu": 1 << 10}
_CHUNK_ACCELERATOR = 1 << 17


def search(vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `directions.nearest_direction`."""
    absolute, negative = vectors.abs(), vectors < 0
    odd = negative.sum(1) % 2 == 1
    columns = directions.T.contiguous()
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    chunk = _CHUNK.get(vectors.device.type, _CHUNK_ACCELERATOR)
    for parity in (False, True):
        members = (odd == parity).nonzero()[:, 0]
        for part in members.split(chunk):
            rows = absolute[part]
            scores = rows @ columns
            if parity:
                scores.sub_(_smallest_product(rows, columns), alpha=2)
            index[part] = scores.argmax(1)

    products = absolute * directions[index]
    smallest, position = products.min(1)
    projection = products.sum(1) - 2 * odd * smallest
    flipped = negative ^ (odd[:, None] & (torch.arange(VECTOR, device=vectors.device) == position[:, None]))
    weights = 1 << torch.arange(SIGN_BITS, device=vectors.device, dtype=torch.int32)
    signs = (flipped[:, :SIGN_BITS] * weights).sum(1, dtype=torch.int32)
    return index.to(torch.int32), signs, projection


def _smallest_product(rows: Tensor, columns: Tensor) -> Tensor:
    """`min_j rows[i, j] * columns[j, p]` for every `i, p`: the outer products are formed one `j` at a time."""
    smallest = rows[:, :1] * columns[0]
    product = torch.empty_like(smallest)
    for j in range(1, VECTOR):
        torch.mul(rows[:, j : j + 1], columns[j], out=product)
        torch.minimum(smallest, product, out=smallest)
    return smallest
