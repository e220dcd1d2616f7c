"""`dequantize_kernel`, which decodes the tiles of any weight, and `sum_kernel`, which adds up the parts of a product."""

from __future__ import annotations

import triton
import triton.language as tl

from . import ccq, pcdvq, stream


@triton.jit
def dequantize_kernel(
    p_out,  # floating [stop - first, K]
    p_weight,
    p_1,  # what else the codec's `decode` reads
    p_2,
    p_3,
    p_4,
    first,  # row to begin with
    stop,  # row to end before
    columns,  # K
    words,  # of a stream
    CODEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
    PATTERNS: tl.constexpr = 0,  # from here on the constants of the codec, which its file explains
    WINDOW: tl.constexpr = 0,
    SHIFTS: tl.constexpr = 0,
    SLOTS: tl.constexpr = 0,
    WORDS: tl.constexpr = 0,
    SCALE_BITS: tl.constexpr = 0,
    CYCLE: tl.constexpr = 0,
    CYCLE_BITS: tl.constexpr = 0,
    ENDS: tl.constexpr = 0,
    MULTIPLIER: tl.constexpr = 0,
    RING: tl.constexpr = 0,
):
    o_row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    row = tl.minimum(o_row, stop - 1)[:, None, None]
    if CODEC == "pcdvq":
        weight = pcdvq.decode(p_weight, p_1, p_2, p_3, p_4, row, start, columns, COLUMNS, PATTERNS)
    elif CODEC == "ccq":
        weight = ccq.decode(
            p_weight, p_1, p_2, p_3, p_4, row, start, columns, COLUMNS, WINDOW, SHIFTS, SLOTS, WORDS, SCALE_BITS
        )
    else:
        weight = stream.decode(
            p_weight, p_1, row, start, columns, words, COLUMNS, WINDOW, CYCLE, CYCLE_BITS, ENDS, MULTIPLIER, RING, PTX
        )
    weight = tl.reshape(weight, [ROWS, COLUMNS])
    o_row, o_column = o_row[:, None], start + tl.arange(0, COLUMNS)[None, :]
    inside = (o_row < stop) & (o_column < columns)
    tl.store(p_out + (o_row - first).to(tl.int64) * columns + o_column, weight, mask=inside)


@triton.jit
def sum_kernel(
    p_parts,  # float32 [SPLIT, numbers]
    p_out,  # floating [numbers]
    numbers,
    splits,
    TILE: tl.constexpr,
):
    """The parts of a product, added up in their order."""
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for i in range(splits):
        total += tl.load(p_parts + tl.cast(i, tl.int64) * numbers + o, mask=o < numbers, other=0.0)
    tl.store(p_out + o, total, mask=o < numbers)
