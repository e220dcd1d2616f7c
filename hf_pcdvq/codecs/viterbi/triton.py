"""The search of `reference.py` as a Triton kernel. Same arguments and algorithm, equal errors up to rounding.

One program searches one ring. From weight to weight, the least errors of all states are passed through a buffer in
global memory, which stays in the caches; a barrier separates the weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from hf_pcdvq_kernels.formats.stream import STREAM_RING, StreamLayout
from torch import Tensor

from .reference import FORBIDDEN

WARPS = 8
# States that a program processes at a time: eight per thread, so that they fit in registers.
_BLOCK = 2048
# Bytes of the buffer for a launch over several columns; a single column may take more if its rings need it.
_BUFFER = 1 << 30


def search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout, overlap: int) -> Tensor:
    """See `viterbi.search`; `overlap` weights on either side of a ring's boundary determine the state there."""
    columns, rows = targets.shape
    targets, cost = targets.contiguous(), cost.contiguous()
    found = torch.empty(columns, rows, dtype=torch.int32, device=targets.device)
    rings = -(-rows // STREAM_RING)
    constant = constants(layout, overlap)
    steps, states = constant["STEPS"], constant["STATES"]
    chunk = max(1, _BUFFER // (4 * steps * states * rings))
    errors = torch.empty(min(chunk, columns) * rings, steps, states, dtype=torch.float32, device=targets.device)
    # Triton launches on the current device, not on that of the tensors.
    here = (
        torch.get_device_module(targets.device).device(targets.device)
        if targets.device.type != "cpu"
        else nullcontext()
    )
    with here:
        for start in range(0, columns, chunk):
            part = targets[start : start + chunk]
            search_kernel[(len(part), rings)](
                part, cost, values, errors, found[start : start + chunk], rows, **constant, num_warps=WARPS
            )
    return found


def constants(layout: StreamLayout, overlap: int) -> dict[str, Any]:
    """The compile-time constants of the kernel."""
    states = 1 << (layout.window_bits - min(layout.strides))
    return {
        "STRIDES": sum(layout.strides[i % len(layout.strides)] << 4 * i for i in range(4)),
        "WINDOW": layout.window_bits,
        "OVERLAP": overlap,
        "RING": STREAM_RING,
        "STEPS": max(STREAM_RING, 2 * overlap) + 1,
        "STATES": states,
        "BLOCK": min(states, _BLOCK),
        "CANDIDATES": 1 << max(layout.strides),
        "FORBIDDEN": FORBIDDEN,
    }


@triton.jit
def search_kernel(
    p_targets,  # float32 [C, N]
    p_cost,  # float32 [N]
    p_values,  # float32 [2^WINDOW]
    p_errors,  # float32 [programs, STEPS, STATES]
    p_found,  # int32 [C, N]
    rows,  # N
    STRIDES: tl.constexpr,  # new bits of weights 0, 1, 2, 3, repeating: four bits each, from the lowest
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
    RING: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    column, ring = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(RING, rows - ring * RING)
    p_targets += column * rows + ring * RING
    p_cost += ring * RING
    p_found += column * rows + ring * RING
    p_errors += (column * tl.num_programs(1) + ring) * STEPS * STATES
    o_state = tl.arange(0, STATES)

    # The state at the ring's boundary: from the best path over the weights around it, free at both ends.
    before = length - OVERLAP % length
    tl.store(p_errors + o_state, tl.zeros([STATES], tl.float32))
    for i in range(2 * OVERLAP):
        _step(
            p_targets,
            p_cost,
            p_values,
            p_errors,
            before,
            length,
            i,
            STRIDES,
            WINDOW,
            STATES,
            BLOCK,
            CANDIDATES,
            FORBIDDEN,
        )
    tl.debug_barrier()
    state = tl.argmin(tl.load(p_errors + 2 * OVERLAP * STATES + o_state), 0)
    for j in range(OVERLAP):
        i = 2 * OVERLAP - 1 - j
        window = _back(
            p_targets, p_cost, p_values, p_errors, before, length, i, state, STRIDES, WINDOW, STATES, CANDIDATES
        )
        state = window >> _stride((before + i) % length, STRIDES)

    # The best path around the ring that begins and ends in that state.
    tl.debug_barrier()
    tl.store(p_errors + o_state, tl.where(o_state == state, 0.0, FORBIDDEN))
    for i in range(length):
        _step(
            p_targets, p_cost, p_values, p_errors, 0, length, i, STRIDES, WINDOW, STATES, BLOCK, CANDIDATES, FORBIDDEN
        )
    tl.debug_barrier()
    for j in range(length):
        i = length - 1 - j
        window = _back(
            p_targets, p_cost, p_values, p_errors, 0, length, i, state, STRIDES, WINDOW, STATES, CANDIDATES
        )
        tl.store(p_found + i, window)
        state = window >> _stride(i, STRIDES)


@triton.jit
def _stride(row, STRIDES: tl.constexpr):
    return (STRIDES >> (row % 4 * 4)) & 15


@triton.jit
def _step(
    p_targets,
    p_cost,
    p_values,
    p_errors,
    first,
    length,
    i,
    STRIDES: tl.constexpr,
    WINDOW: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    """Advance the least errors from before weight `first + i` of the ring to after it."""
    row = (first + i) % length
    stride, next_stride = _stride(row, STRIDES), _stride((row + 1) % length, STRIDES)
    target, cost = tl.load(p_targets + row), tl.load(p_cost + row)
    tl.debug_barrier()  # the previous errors were written by other threads
    for start in range(0, STATES, BLOCK):
        o_state = start + tl.arange(0, BLOCK)
        exists = o_state < (1 << (WINDOW - next_stride))
        least = tl.full([BLOCK], FORBIDDEN, tl.float32)
        for high in tl.static_range(CANDIDATES):
            window = (high << (WINDOW - next_stride)) | o_state
            valid = exists & (window < (1 << WINDOW))
            difference = tl.load(p_values + window, mask=valid, other=0.0) - target
            path = tl.load(p_errors + i * STATES + (window >> stride), mask=valid, other=FORBIDDEN)
            least = tl.minimum(least, path + cost * difference * difference)
        tl.store(p_errors + (i + 1) * STATES + o_state, least)


@triton.jit
def _back(
    p_targets,
    p_cost,
    p_values,
    p_errors,
    first,
    length,
    i,
    state,
    STRIDES: tl.constexpr,
    WINDOW: tl.constexpr,
    STATES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The window at weight `first + i` of the best path that is in `state` after it."""
    row = (first + i) % length
    stride, next_stride = _stride(row, STRIDES), _stride((row + 1) % length, STRIDES)
    target, cost = tl.load(p_targets + row), tl.load(p_cost + row)
    o_high = tl.arange(0, CANDIDATES)
    window = (o_high << (WINDOW - next_stride)) | state
    valid = window < (1 << WINDOW)
    difference = tl.load(p_values + window, mask=valid, other=0.0) - target
    path = tl.load(p_errors + i * STATES + (window >> stride), mask=valid, other=float("inf"))
    best = tl.argmin(path + cost * difference * difference, 0)
    return (best << (WINDOW - next_stride)) | state
