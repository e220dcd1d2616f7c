"""The search of `reference.py` as CPU loops compiled by Numba. Same arguments and algorithm, equal up to rounding."""

from __future__ import annotations

import numpy as np
import torch
from hf_pcdvq_kernels.formats.stream import STREAM_RING, StreamLayout
from numba import njit, prange
from torch import Tensor

from ..compiled import torch_threads
from .reference import FORBIDDEN


def search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout, overlap: int) -> Tensor:
    """See `viterbi.search`; `overlap` weights on either side of a ring's boundary determine the state there."""
    columns, rows = targets.shape
    strides = np.resize(np.array(layout.strides), min(rows, STREAM_RING))
    found = np.empty((columns, rows), np.int32)
    table = values.numpy()
    by_code = {stride: np.ascontiguousarray(table.reshape(-1, 1 << stride).T) for stride in set(layout.strides)}
    tables = tuple(by_code.get(stride, np.empty((0, 0), np.float32)) for stride in (2, 3, 4))
    with torch_threads():
        _search(
            targets.contiguous().numpy(), cost.numpy(), table, tables, strides, layout.window_bits, overlap, found
        )
    return torch.from_numpy(found)


@njit(parallel=True)
def _search(targets, cost, values, tables, strides, window, overlap, found):  # pragma: no cover
    rings = (targets.shape[1] + STREAM_RING - 1) // STREAM_RING
    for number in prange(len(targets) * rings):
        column, start = number // rings, number % rings * STREAM_RING
        target, weight = targets[column, start : start + STREAM_RING], cost[start : start + STREAM_RING]
        errors = np.empty((max(len(target), 2 * overlap) + 1, 1 << (window - 2)), np.float32)
        trellis = (target, weight, values, tables, strides, window, errors)
        _ring(trellis, overlap, found[column, start : start + STREAM_RING])


@njit
def _ring(trellis, overlap, found):  # pragma: no cover
    """Fill `found` with the windows of one ring."""
    target, _, _, _, strides, window, errors = trellis
    length = len(target)
    errors[0] = 0
    before = length - overlap % length  # start of the stretch around the boundary
    _forward(trellis, before, 2 * overlap)
    states = 1 << (window - strides[overlap % length])
    windows = np.empty(2 * overlap, np.int32)
    state = _back(trellis, before, 2 * overlap, overlap, np.argmin(errors[2 * overlap, :states]), windows)

    errors[0] = FORBIDDEN
    errors[0, state] = 0
    _forward(trellis, 0, length)
    _back(trellis, 0, length, 0, state, found)


@njit
def _forward(trellis, first, count):  # pragma: no cover
    """Least errors of the paths to every state, from `errors[0]` over `count` weights, wrapping around the ring."""
    target, cost, _, tables, strides, window, errors = trellis
    length = len(target)
    scratch = np.empty((16, 1 << (window - 4)), np.float32)
    for i in range(count):
        row = (first + i) % length
        stride, next_stride = strides[row], strides[(row + 1) % length]
        _step(
            errors[i], errors[i + 1], scratch, tables[stride - 2], target[row], cost[row], window, stride, next_stride
        )


@njit(fastmath=True)
def _step(before, after, scratch, table, target, cost, window, stride, next_stride):  # pragma: no cover
    """Advance by one weight. `table[c]` holds the values of the windows whose new bits are `c`, by preceding state.

    The loops run along adjacent states and take four paths, then four codes, at a time (strides are at least 2),
    which the compiler vectorizes.
    """
    merged = 1 << (window - stride - next_stride)
    for code in range(1 << stride):
        least = scratch[code, :merged]
        for high in range(0, 1 << next_stride, 4):
            path, value = before[high * merged :], table[code, high * merged :]
            path_0, path_1, path_2, path_3 = path, path[merged:], path[2 * merged :], path[3 * merged :]
            value_0, value_1, value_2, value_3 = value, value[merged:], value[2 * merged :], value[3 * merged :]
            for m in range(merged):
                error_0, error_1, error_2, error_3 = (
                    value_0[m] - target,
                    value_1[m] - target,
                    value_2[m] - target,
                    value_3[m] - target,
                )
                error = min(
                    min(path_0[m] + cost * error_0 * error_0, path_1[m] + cost * error_1 * error_1),
                    min(path_2[m] + cost * error_2 * error_2, path_3[m] + cost * error_3 * error_3),
                )
                least[m] = error if high == 0 else min(least[m], error)
    states = after[: merged << stride].reshape(merged, 1 << stride)
    for code in range(0, 1 << stride, 4):
        least_0, least_1, least_2, least_3 = scratch[code], scratch[code + 1], scratch[code + 2], scratch[code + 3]
        for m in range(merged):
            states[m, code] = least_0[m]
            states[m, code + 1] = least_1[m]
            states[m, code + 2] = least_2[m]
            states[m, code + 3] = least_3[m]


@njit
def _back(trellis, first, count, stop, state, windows):  # pragma: no cover
    """Trace the best path to `state` back to weight `stop`: fills `windows`, returns the state before that weight."""
    target, cost, values, _, strides, window, errors = trellis
    length = len(target)
    for i in range(count - 1, stop - 1, -1):
        row = (first + i) % length
        stride, next_stride = strides[row], strides[(row + 1) % length]
        best, least = 0, np.float32(np.inf)
        for high in range(1 << next_stride):
            candidate = high << (window - next_stride) | state
            difference = values[candidate] - target[row]
            error = errors[i, candidate >> stride] + cost[row] * difference * difference
            if error < least:
                best, least = candidate, error
        windows[i] = best
        state = best >> stride
    return state
