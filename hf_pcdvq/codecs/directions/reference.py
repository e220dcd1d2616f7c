"""The search for the nearest direction in PyTorch, which is the reference."""

from __future__ import annotations

import torch
from hf_pcdvq_kernels.formats.pcdvq import SIGN_BITS, VECTOR
from torch import Tensor

# Vectors scored against all patterns at a time: 2 MiB of scores for 512 patterns, which stays in a core's cache and
# is 2.4 times as fast on a CPU as chunks of 16384.
_CHUNK = 1 << 10
# On an accelerator: 256 MiB of products, in few and large operations, none of which has to wait for another's result.
_CHUNK_ACCELERATOR = 1 << 14


def search(vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `directions.nearest_direction`."""
    absolute, negative = vectors.abs(), vectors < 0
    odd = negative.sum(1) % 2 == 1
    columns = directions.T.contiguous()
    index = (_on_cpu if vectors.device.type == "cpu" else _on_accelerator)(absolute, odd, columns)

    products = absolute * directions[index]
    smallest, position = products.min(1)
    projection = products.sum(1) - 2 * odd * smallest
    flipped = negative ^ (odd[:, None] & (torch.arange(VECTOR, device=vectors.device) == position[:, None]))
    weights = 1 << torch.arange(SIGN_BITS, device=vectors.device, dtype=torch.int32)
    signs = (flipped[:, :SIGN_BITS] * weights).sum(1, dtype=torch.int32)
    return index.to(torch.int32), signs, projection


def _on_cpu(absolute: Tensor, odd: Tensor, columns: Tensor) -> Tensor:
    """The best pattern of every vector, int64 `[n]`. Vectors with an even number of negative signs are scored apart."""
    index = torch.empty(len(absolute), dtype=torch.int64)
    for parity in (False, True):
        members = (odd == parity).nonzero()[:, 0]
        for part in members.split(_CHUNK):
            rows = absolute[part]
            scores = rows @ columns
            if parity:
                scores.sub_(_smallest_product(rows, columns), alpha=2)
            index[part] = scores.argmax(1)
    return index


def _on_accelerator(absolute: Tensor, odd: Tensor, columns: Tensor) -> Tensor:
    """The same without waiting for which vectors are odd."""
    parts = []
    for rows, flip in zip(absolute.split(_CHUNK_ACCELERATOR), odd.split(_CHUNK_ACCELERATOR)):
        smallest = (rows[:, :, None] * columns).amin(1)
        parts.append((rows @ columns).sub_(flip[:, None] * smallest, alpha=2).argmax(1))
    return torch.cat(parts)


def _smallest_product(rows: Tensor, columns: Tensor) -> Tensor:
    """`min_j rows[i, j] * columns[j, p]` for every `i, p`: the outer products are formed one `j` at a time."""
    smallest = rows[:, :1] * columns[0]
    product = torch.empty_like(smallest)
    for j in range(1, VECTOR):
        torch.mul(rows[:, j : j + 1], columns[j], out=product)
        torch.minimum(smallest, product, out=smallest)
    return smallest
