"""The search of `reference.py` as a Triton kernel. Same arguments and algorithm, equal errors up to rounding.

One program searches one ring. From weight to weight, the least errors of all states stay in registers and shared memory;
they are also written to a buffer in global memory, from which the best path is traced back.
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
                part,
                cost,
                values,
                errors,
                found[start : start + chunk],
                rows,
                **constant,
                num_warps=warps(layout, 64 if torch.version.hip else 32),
            )
    return found


def constants(layout: StreamLayout, overlap: int) -> dict[str, Any]:
    """The compile-time constants of the kernel."""
    states = 1 << (layout.window_bits - min(layout.strides))
    return {
        "STRIDES": sum(layout.strides[i % len(layout.strides)] << 4 * i for i in range(4)),
        "PHASES": len(layout.strides),
        "WINDOW": layout.window_bits,
        "OVERLAP": overlap,
        "RING": STREAM_RING,
        "STEPS": max(STREAM_RING, 2 * overlap) + 1,
        "STATES": states,
        "CANDIDATES": 1 << max(layout.strides),
        "FORBIDDEN": FORBIDDEN,
    }


def warps(layout: StreamLayout, lanes: int) -> int:
    """Warps of a program, of so many threads each: 16 windows per thread, with at most 1024 threads.

    Windows of 15 and 16 bits are more than the registers of so many threads hold; the rest goes to the caches.
    """
    return min(1024, (1 << layout.window_bits) // 16) // lanes


@triton.jit
def search_kernel(
    p_targets,  # float32 [C, N]
    p_cost,  # float32 [N]
    p_values,  # float32 [2^WINDOW]
    p_errors,  # float32 [programs, STEPS, STATES]
    p_found,  # int32 [C, N]
    rows,  # N
    STRIDES: tl.constexpr,  # new bits of weights 0, 1, 2, 3, repeating: four bits each, from the lowest
    PHASES: tl.constexpr,  # they repeat after so many weights
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
    RING: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    column, ring = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(RING, rows - ring * RING)
    p_targets += column * rows + ring * RING
    p_cost += ring * RING
    p_found += column * rows + ring * RING
    p_errors += (column * tl.num_programs(1) + ring) * STEPS * STATES
    o_state = tl.arange(0, 1 << (WINDOW - (STRIDES & 15)))

    # The state at the ring's boundary: from the best path over the weights around it, free at both ends.
    before = length - OVERLAP % length  # a multiple of PHASES, as the length is
    path = tl.zeros([1 << (WINDOW - (STRIDES & 15))], tl.float32)
    path = _forward(
        path, p_targets, p_cost, p_values, p_errors, before, length, 2 * OVERLAP, STRIDES, PHASES, WINDOW, STATES
    )
    state = tl.argmin(path, 0)
    tl.debug_barrier()  # the errors were written by other threads
    for j in range(OVERLAP):
        i = 2 * OVERLAP - 1 - j
        window = _back(
            p_targets, p_cost, p_values, p_errors, before, length, i, state, STRIDES, WINDOW, STATES, CANDIDATES
        )
        state = window >> _stride((before + i) % length, STRIDES)

    # The best path around the ring that begins and ends in that state.
    tl.debug_barrier()
    path = tl.where(o_state == state, 0.0, FORBIDDEN)
    path = _forward(path, p_targets, p_cost, p_values, p_errors, 0, length, length, STRIDES, PHASES, WINDOW, STATES)
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
def _forward(
    path,  # float32 [states before the first weight]: their least errors
    p_targets,
    p_cost,
    p_values,
    p_errors,
    first,
    length,
    count,
    STRIDES: tl.constexpr,
    PHASES: tl.constexpr,
    WINDOW: tl.constexpr,
    STATES: tl.constexpr,
):
    """Least errors of the paths to every state after `count` weights of the ring from `first` on.

    Those before every weight are written to `p_errors`.
    """
    kept = _window_values(p_values, STRIDES & 15, (STRIDES >> 4) & 15, WINDOW)
    for start in range(0, count, PHASES):
        for phase in tl.static_range(PHASES):
            values = kept
            if PHASES > 1:
                values = _window_values(
                    p_values, (STRIDES >> (4 * phase)) & 15, (STRIDES >> (4 * ((phase + 1) % 4))) & 15, WINDOW
                )
            path = _step(
                path,
                p_targets,
                p_cost,
                values,
                p_errors,
                first,
                length,
                start + phase,
                (STRIDES >> (4 * phase)) & 15,
                (STRIDES >> (4 * ((phase + 1) % 4))) & 15,
                WINDOW,
                STATES,
            )
    return path


@triton.jit
def _window_values(p_values, STRIDE: tl.constexpr, NEXT: tl.constexpr, WINDOW: tl.constexpr):
    """The values of all windows, by their oldest bits, which go next, those that stay, and the new ones."""
    MERGED: tl.constexpr = 1 << (WINDOW - STRIDE - NEXT)
    o_state = tl.arange(0, 1 << NEXT)[:, None] * MERGED + tl.arange(0, MERGED)[None, :]
    return tl.load(p_values + (o_state[:, :, None] << STRIDE) + tl.arange(0, 1 << STRIDE)[None, None, :])


@triton.jit
def _step(
    path,
    p_targets,
    p_cost,
    values,  # of `_window_values`
    p_errors,
    first,
    length,
    i,
    STRIDE: tl.constexpr,
    NEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    STATES: tl.constexpr,
):
    """Advance the least errors from before weight `first + i` of the ring to after it."""
    MERGED: tl.constexpr = 1 << (WINDOW - STRIDE - NEXT)
    row = (first + i) % length
    target, cost = tl.load(p_targets + row), tl.load(p_cost + row)
    tl.store(p_errors + i * STATES + tl.arange(0, 1 << (WINDOW - STRIDE)), path)
    difference = values - target
    errors = tl.reshape(path, [1 << NEXT, MERGED])[:, :, None] + cost * difference * difference
    return tl.reshape(tl.min(errors, 0), [MERGED << STRIDE])


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
