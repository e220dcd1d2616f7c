"""Tiles of a decoded weight, shared by the `dequantize_kernel` of every format, and the sum over split-k parts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(first, stop, ROWS: tl.constexpr):
    """The rows of this program's tile as int32 [ROWS, 1, 1]; past the end, the last row repeats."""
    return tl.minimum(first + tl.program_id(0) * ROWS + tl.arange(0, ROWS), stop - 1)[:, None, None]


@triton.jit
def tile_start(COLUMNS: tl.constexpr):
    """The first column of this program's tile."""
    return tl.program_id(1) * COLUMNS


@triton.jit
def store_tile(p_out, weight, first, stop, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store `weight`, float32 [ROWS, COLUMNS] in any shape, as this program's tile of [stop - first, columns]."""
    o_row = (first + tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    o_column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (o_row < stop) & (o_column < columns)
    weight = tl.reshape(weight, [ROWS, COLUMNS])
    tl.store(p_out + (o_row - first).to(tl.int64) * columns + o_column, weight, mask=inside)


@triton.jit
def sum_kernel(
    p_parts,  # float32 [SPLIT, numbers]
    p_out,  # floating [numbers]
    numbers,
    splits,
    TILE: tl.constexpr,
):
    """The sum of the split-k parts of a product, in order."""
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for i in range(splits):
        total += tl.load(p_parts + tl.cast(i, tl.int64) * numbers + o, mask=o < numbers, other=0.0)
    tl.store(p_out + o, total, mask=o < numbers)
