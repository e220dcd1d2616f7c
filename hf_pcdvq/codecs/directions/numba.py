"""The search for the nearest direction as CPU loops compiled by Numba. Same results, up to ties and rounding."""

from __future__ import annotations

import numpy as np
import torch
from hf_pcdvq_kernels.formats.pcdvq import SIGN_BITS, VECTOR
from numba import njit, prange
from torch import Tensor

from ..compiled import torch_threads

_LANES = 32  # patterns scored at a time: the compiler makes vector instructions of the loops over them
_CHUNK = 64  # vectors that a thread takes at a time
_TWO = np.float32(2)


def search(vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `directions.nearest_direction`."""
    tiles = directions.unflatten(0, (-1, _LANES)).transpose(1, 2).contiguous()  # [P / 32, 8, 32]
    index, signs = (torch.empty(len(vectors), dtype=torch.int32) for _ in range(2))
    projection = torch.empty(len(vectors), dtype=torch.float32)
    with torch_threads():
        _search(vectors.contiguous().numpy(), tiles.numpy(), index.numpy(), signs.numpy(), projection.numpy())
    return index, signs, projection


@njit(parallel=True)
def _search(vectors, tiles, index, signs, projection):  # pragma: no cover
    for chunk in prange((len(vectors) + _CHUNK - 1) // _CHUNK):
        best, found = np.empty(_LANES, np.float32), np.empty(_LANES, np.int32)
        for number in range(chunk * _CHUNK, min(len(vectors), (chunk + 1) * _CHUNK)):
            vector, negative, odd = vectors[number], 0, False
            for j in range(VECTOR):
                if vector[j] < 0:
                    negative, odd = negative | 1 << j, not odd
            best[:] = -1  # less than any score
            _score(_absolute(vector), odd, tiles, best, found)
            pattern, most = 0, np.float32(-1)
            for lane in range(_LANES):
                other = found[lane] * _LANES + lane
                if best[lane] > most or (best[lane] == most and other < pattern):
                    pattern, most = other, best[lane]
            if odd:
                negative ^= 1 << _smallest(vector, tiles[pattern // _LANES, :, pattern % _LANES])
            index[number], signs[number] = pattern, negative & ((1 << SIGN_BITS) - 1)
            projection[number] = most


@njit
def _absolute(v):  # pragma: no cover
    return abs(v[0]), abs(v[1]), abs(v[2]), abs(v[3]), abs(v[4]), abs(v[5]), abs(v[6]), abs(v[7])


@njit(fastmath={"contract", "nnan", "nsz"})
def _score(absolute, odd, tiles, best, found):  # pragma: no cover
    """For every lane, the largest score of its patterns, and the number of the tile where that is."""
    v_0, v_1, v_2, v_3, v_4, v_5, v_6, v_7 = absolute
    for number in range(len(tiles)):
        tile = tiles[number]
        d_0, d_1, d_2, d_3, d_4, d_5, d_6, d_7 = (
            tile[0],
            tile[1],
            tile[2],
            tile[3],
            tile[4],
            tile[5],
            tile[6],
            tile[7],
        )
        for lane in range(_LANES):
            p_0, p_1, p_2, p_3 = v_0 * d_0[lane], v_1 * d_1[lane], v_2 * d_2[lane], v_3 * d_3[lane]
            p_4, p_5, p_6, p_7 = v_4 * d_4[lane], v_5 * d_5[lane], v_6 * d_6[lane], v_7 * d_7[lane]
            score = p_0 + p_1 + p_2 + p_3 + p_4 + p_5 + p_6 + p_7
            if odd:
                score -= _TWO * min(min(min(p_0, p_1), min(p_2, p_3)), min(min(p_4, p_5), min(p_6, p_7)))
            before, tile_before = best[lane], found[lane]
            best[lane] = score if score > before else before
            found[lane] = np.int32(number) if score > before else tile_before


@njit
def _smallest(vector, direction):  # pragma: no cover
    """Where the product of absolute value and direction is smallest."""
    place, least = 0, np.float32(np.inf)
    for j in range(VECTOR):
        product = abs(vector[j]) * direction[j]
        if product < least:
            place, least = j, product
    return place
