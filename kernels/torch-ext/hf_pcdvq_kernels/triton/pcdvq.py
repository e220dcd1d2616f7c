"""Decoding of PCDVQ codes in Triton. The format is documented in `hf_pcdvq/codecs/polar.py`.

The signs of a vector take two multiplications: bit i of the word, times 2^(7 + 7i), lands on the top bit of byte i,
and the products do not overlap, so there are no carries. A byte of the pattern below a byte in which at most the top
bit is set is then a float16: the pattern's value, times 2^-24, with its sign.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..formats.pcdvq import PcdvqWeight
from . import half2, tiles
from .dependent_launch import wait_for_inputs
from .format_kernels import FormatKernels, aligned, given

TOPS = tl.constexpr(0x80808080 - (1 << 32))  # the top bit of every byte, as int32


@triton.jit
def decode(
    p_weight,  # int16 [N, K / 8]
    p_magnitude,  # uint8 [N, K / 32], if PATTERNS is 512
    p_scale,  # float32 [N]
    p_patterns,  # int8 [PATTERNS, 8]
    p_levels,  # float32 [4]
    row,  # int32 [ROWS, 1, 1], valid rows of the weight
    start,  # first column, a multiple of 64
    columns,  # K
    COLUMNS: tl.constexpr,
    PATTERNS: tl.constexpr,
):
    """Weights as float32 [ROWS, COLUMNS / 8, 8]; columns past the end repeat the last ones."""
    vectors = columns // 8
    o_vector = tl.minimum(start // 8 + tl.arange(0, COLUMNS // 8), vectors - 1)[None, :, None]
    o_entry = tl.arange(0, 8)[None, None, :]
    word = tl.load(p_weight + row.to(tl.int64) * vectors + o_vector).to(tl.int32) & 0xFFFF
    if PATTERNS == 512:
        byte = tl.load(p_magnitude + row.to(tl.int64) * (vectors // 4) + o_vector // 4).to(tl.int32)
        level = (byte >> (o_vector % 4 * 2)) & 3
    else:
        level = word >> 14
    factor = tl.load(p_scale + row) * tl.load(p_levels + level)
    signs = word & 127
    signs |= (half2.parity(signs, False) & 1) << 7
    pattern = tl.load(p_patterns.to(tl.pointer_type(tl.int64)) + ((word >> 7) & (PATTERNS - 1)))
    entry = ((pattern >> (8 * o_entry)) & 0x7F).to(tl.int32).to(tl.float32)
    return tl.where(((signs >> o_entry) & 1) != 0, -entry, entry) * factor


@triton.jit
def dequantize_kernel(
    p_out,  # floating [stop - first, K]
    p_weight,
    p_magnitude,
    p_scale,
    p_patterns,
    p_levels,
    first,  # first row
    stop,  # row after the last
    columns,  # K
    PATTERNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):
    row, start = tiles.tile_rows(first, stop, ROWS), tiles.tile_start(COLUMNS)
    weight = decode(p_weight, p_magnitude, p_scale, p_patterns, p_levels, row, start, columns, COLUMNS, PATTERNS)
    tiles.store_tile(p_out, weight, first, stop, columns, ROWS, COLUMNS)


@triton.jit
def matmul_kernel(
    p_x,  # int64 [G T, U / UNITS, 8, UNITS]; if DOT, in sets of tokens: see `activations.py`
    p_x_scale,  # float32 [G T, U], U padded to a multiple of UNITS; [G T] if DOT
    p_weight,  # int16 [N, 4 U]
    p_magnitude,  # uint8 [N, U], if PATTERNS is 512
    p_scale,  # float32 [N]
    p_patterns,  # int8 [PATTERNS, 8]
    p_levels,  # float32 [4]
    p_experts,  # int32 [G], if GROUPED: index of each group's weight in the stacked tensors; outside of them: none
    p_out,  # floating [SPLIT, G, T, N]
    tokens,  # per group
    rows,  # N
    units,  # U = K / 32, four vectors each
    stack,  # number of weights in the stacked tensors; 1 without a stack
    span,  # blocks of UNITS units per split
    PATTERNS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,  # use matrix units, see `half2.dot4`, instead of accumulating products of float16 pairs
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent_launch.py`
    GROUPED: tl.constexpr,  # G products with weights of a stack, along the third grid axis
):
    wait_for_inputs(PDL)
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, wanted = half2.group_expert(p_experts, stack, GROUPED)
    row = (expert * rows + tl.minimum(o_row, rows - 1))[None, :, None]
    # One element per thread: threads holding several adjacent ones would have a different layout than the sums.
    o_lane = tl.max_contiguous(tl.arange(0, UNITS), 1)[None, None, :]
    blocks = tl.cdiv(units, UNITS)
    STEP: tl.constexpr = UNITS * half2.TOGETHER if DOT else UNITS  # from quad to quad
    p_x, p_x_scale = half2.activation_pointers(p_x, p_x_scale, tokens, blocks, 8, T, UNITS, DOT)
    zero = half2.per_lane_zero(o_lane, PTX)
    p_words = p_weight.to(tl.pointer_type(tl.int64)) + (row * units + zero)
    p_table = p_patterns.to(tl.pointer_type(tl.int64)) + zero
    p_magnitude += row * units + zero
    p_levels += zero
    scale = tl.load(p_scale + row)
    # Levels times 64 are near one, which suits float16; times 2^12 more, so do their products with patterns. Both as pairs and
    # split into low and high bytes.
    LEVEL: tl.constexpr = 2.0 ** (18 if DOT else 6)
    level01 = half2.join((tl.load(p_levels) * LEVEL).to(tl.float16), (tl.load(p_levels + 1) * LEVEL).to(tl.float16))
    level23 = half2.join(
        (tl.load(p_levels + 2) * LEVEL).to(tl.float16), (tl.load(p_levels + 3) * LEVEL).to(tl.float16)
    )
    level_low = half2.permute_bytes(level01, level23, 0x6420, PTX)
    level_high = half2.permute_bytes(level01, level23, 0x7531, PTX)

    acc = tl.zeros([BLOCK_N, T] if DOT else [T, BLOCK_N, UNITS], tl.float32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, blocks)
    if GROUPED:
        stop = tl.where(wanted, stop, begin)
    # The weights of a block are loaded while the block before it is computed.
    words, magnitudes = _load(p_words, p_magnitude, begin, o_lane, units, UNITS, PATTERNS, PTX)
    for block in range(begin, stop):
        p_block = p_x + block * (8 * STEP)
        following = tl.minimum(block + 1, stop - 1)
        next_words, next_magnitudes = _load(p_words, p_magnitude, following, o_lane, units, UNITS, PATTERNS, PTX)
        if PATTERNS == 512:
            # Spread the four magnitudes of a byte over the four nibbles of a byte selector, which selects the low
            # bytes and the high bytes of their levels.
            select = (magnitudes | (magnitudes << 4)) & 0x0F0F
            select = (select | (select << 2)) & 0x3333
            low_bytes = half2.select_bytes(level_low, select, PTX)
            high_bytes = half2.select_bytes(level_high, select, PTX)
        total = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
        for j in tl.static_range(4):
            word = (words >> (16 * j)).to(tl.int32) & 0xFFFF
            pattern = half2.table_entry(p_table, (word >> 7) & (PATTERNS - 1), PTX)
            signs = word & 127
            if PATTERNS == 512:
                level = half2.permute_bytes(low_bytes, high_bytes, (j + 4) * 0x1010 + j * 0x101, PTX)
            else:
                level = half2.select_half(level01, level23, word >> 14, PTX)
            chain = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
            for half in tl.static_range(2):
                if half == 0:
                    tops = (signs * 0x10204080) & TOPS
                else:
                    tops = (signs * 0x20408 + (half2.parity(signs, PTX) << 31)) & TOPS
                entries = (pattern >> (32 * half)).to(tl.int32)
                first = half2.permute_bytes(entries, tops, 0x5140, PTX)
                second = half2.permute_bytes(entries, tops, 0x7362, PTX)
                quad = half2.load_lanes(p_block, (2 * j + half) * STEP)
                if DOT:
                    acc = half2.dot4(acc, half2.mul2(first, level, PTX), half2.mul2(second, level, PTX), quad, PTX)
                else:
                    chain = half2.fma2(first, quad.to(tl.int32), chain, PTX)
                    chain = half2.fma2(second, (quad >> 32).to(tl.int32), chain, PTX)
            if not DOT:
                total = half2.fma2(chain, level, total, PTX)
        if not DOT:
            acc = tl.fma(half2.sum2(total), half2.load_lanes(p_x_scale, block * UNITS), acc)
        words, magnitudes = next_words, next_magnitudes

    # 2^24 from the patterns over what the levels were multiplied by.
    scale = tl.reshape(scale, [BLOCK_N]) * (2.0**24 / LEVEL)
    if DOT:
        out = half2.dot_result(acc, scale, p_x_scale)
    else:
        out = tl.sum(acc, 2) * scale[None, :]
    half2.store_product(p_out, out, o_row, tokens, rows, T)


@triton.jit
def _load(p_words, p_magnitude, block, o_lane, units, UNITS: tl.constexpr, PATTERNS: tl.constexpr, PTX: tl.constexpr):
    """The words and magnitudes of a block; past the end, where activations are zero, the last ones repeat."""
    o_unit = tl.minimum(block * UNITS + o_lane, units - 1)
    words = half2.load_lanes(p_words, o_unit)
    magnitudes = words  # not read if they are in the words
    if PATTERNS == 512:
        magnitudes = half2.load_bytes(p_magnitude, o_unit, PTX)
    return words, magnitudes


class PcdvqKernels(FormatKernels[PcdvqWeight]):
    """Each lane takes 32 inputs at a time: four vectors, whose words are one 64-bit load."""

    matmul_kernel, dequantize_kernel = matmul_kernel, dequantize_kernel
    lane_inputs = 32
    product_multiple = 32

    def operands(self, weight: PcdvqWeight) -> dict[str, Tensor]:
        return {
            "p_weight": weight.words,
            "p_magnitude": given(weight.magnitude, weight.weight),
            "p_scale": weight.scale,
            "p_patterns": aligned(weight.patterns),
            "p_levels": weight.levels,
        }

    def constants(self, weight: PcdvqWeight) -> dict[str, Any]:
        return {"PATTERNS": len(weight.patterns)}

    def block_n(self, name: str) -> tuple[int, ...]:
        return (8, 4)
