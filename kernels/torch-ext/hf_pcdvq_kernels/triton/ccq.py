"""Decoding of the published CCQ layouts in Triton. Formats are documented in `hf_pcdvq/codecs/convolutional.py`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..formats.ccq import CcqWeight, ccq_layout
from . import half2, tiles
from .activations import TOGETHER, Order
from .dependent_launch import wait_for_inputs
from .format_kernels import FormatKernels, given


@triton.jit
def decode(
    p_weight,  # uint8 or int16 [N, U WORDS]
    p_scale,  # float32 [N]
    p_local,  # uint8 [N, ceil(U / 2)], if SCALE_BITS is 0
    p_code_scale,  # float32 [N], if SCALE_BITS is 0
    p_code_zero,  # float32 [N], if SCALE_BITS is 0
    row,  # int32 [ROWS, 1, 1], valid rows of the weight
    start,  # first column, a multiple of 64
    columns,  # K
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
):
    """Weights as float32 [ROWS, COLUMNS / 64, 64]; columns past the end repeat the last ones."""
    units = columns // 64
    o_unit = tl.minimum(start // 64 + tl.arange(0, COLUMNS // 64), units - 1)[None, :, None]
    o_weight = tl.arange(0, 64)[None, None, :]
    p_group = p_weight + (row.to(tl.int64) * units + o_unit) * WORDS
    code = tl.load(p_group + o_weight // SLOTS).to(tl.int32)
    if SCALE_BITS == 0:
        code = (code.to(tl.float32) * tl.load(p_code_scale + row) + tl.load(p_code_zero + row)) + 0.5
        code = tl.floor(code).to(tl.int32)
        byte = tl.load(p_local + row.to(tl.int64) * ((units + 1) // 2) + o_unit // 2).to(tl.int32)
        group_scale = (byte >> (4 - 4 * (o_unit % 2))) & 15
    else:  # at the low end of the last code word
        group_scale = tl.load(p_group + (WORDS - 1)).to(tl.int32) & ((1 << SCALE_BITS) - 1)
    value = ((code >> ((SHIFTS >> (o_weight % SLOTS * 4)) & 15)) & ((1 << WINDOW) - 1)) - (1 << (WINDOW - 1))
    return (group_scale.to(tl.float32) * tl.load(p_scale + row)) * value.to(tl.float32)


@triton.jit
def dequantize_kernel(
    p_out,  # floating [stop - first, K]
    p_weight,
    p_scale,
    p_local,
    p_code_scale,
    p_code_zero,
    first,  # first row
    stop,  # row after the last
    columns,  # K
    WINDOW: tl.constexpr,
    SHIFTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):
    row, start = tiles.tile_rows(first, stop, ROWS), tiles.tile_start(COLUMNS)
    weight = decode(
        p_weight, p_scale, p_local, p_code_scale, p_code_zero, row, start, columns,
        COLUMNS, WINDOW, SHIFTS, SLOTS, WORDS, SCALE_BITS,
    )  # fmt: skip
    tiles.store_tile(p_out, weight, first, stop, columns, ROWS, COLUMNS)


@triton.jit
def matmul_kernel(
    p_x,  # int64 [G T, U / UNITS, QUADS, UNITS]; if DOT, in sets of tokens: see `activations.py`
    p_x_scale,  # float32 [G T, U], U padded to a multiple of UNITS; [G T] if DOT
    p_weight,  # packed [N, ...]
    p_scale,  # float32 [N]
    p_local,  # uint8 [N, ceil(U / 2)], if SCALE_BITS is 0
    p_code_scale,  # float32 [N], if SCALE_BITS is 0
    p_code_zero,  # float32 [N], if SCALE_BITS is 0
    p_experts,  # int32 [G], if GROUPED: index of each group's weight in the stacked tensors; outside of them: none
    p_out,  # floating [SPLIT, G, T, N]
    tokens,  # per group
    rows,  # N
    units,  # U = K / 64 groups
    stack,  # number of weights in the stacked tensors; 1 without a stack
    span,  # blocks of UNITS groups per split
    WINDOW: tl.constexpr,
    SHIFTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,  # use matrix units, see `half2.dot4`, instead of accumulating products of float16 pairs
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent_launch.py`
    GROUPED: tl.constexpr,  # G products with weights of a stack, along the third grid axis
):
    wait_for_inputs(PDL)
    CLUSTERED: tl.constexpr = SCALE_BITS == 0
    # Bits per load: the size of a group is a multiple of it.
    LOAD: tl.constexpr = 64 if CLUSTERED else (32 if SLOTS == 7 else 16)
    LOADS: tl.constexpr = WORDS * (16 if SLOTS == 7 else 8) // LOAD
    LOADED: tl.constexpr = 4 if CLUSTERED else 1  # pairs of code words per load
    QUADS: tl.constexpr = (LOADS * LOADED * SLOTS + 1) // 2  # pairs of pairs of activations per group
    WORD: tl.constexpr = tl.int16 if LOAD == 16 else (tl.int32 if LOAD == 32 else tl.int64)

    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, wanted = half2.group_expert(p_experts, stack, GROUPED)
    row = (expert * rows + tl.minimum(o_row, rows - 1))[None, :, None]
    # One element per thread: threads holding several adjacent ones would have a different layout than the sums.
    o_lane = tl.max_contiguous(tl.arange(0, UNITS), 1)[None, None, :]
    blocks = tl.cdiv(units, UNITS)
    STEP: tl.constexpr = UNITS * half2.TOGETHER if DOT else UNITS  # from quad to quad
    p_x, p_x_scale = half2.activation_pointers(p_x, p_x_scale, tokens, blocks, QUADS, T, UNITS, DOT)
    p_words = p_weight.to(tl.pointer_type(WORD)) + row * units * LOADS
    scale = tl.load(p_scale + row)
    if CLUSTERED:
        code_scale = tl.load(p_code_scale + row)
        code_zero = tl.load(p_code_zero + row)
        p_local += row * ((units + 1) // 2)

    acc = tl.zeros([BLOCK_N, T] if DOT else [T, BLOCK_N, UNITS], tl.float32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, blocks)
    if GROUPED:
        stop = tl.where(wanted, stop, begin)
    for block in range(begin, stop):
        o_unit = tl.minimum(block * UNITS + o_lane, units - 1)  # past the end, activations are zero
        if CLUSTERED:
            group_scale = (half2.load_bytes(p_local, o_unit // 2, PTX) >> (4 - 4 * (o_unit % 2))) & 15
        else:  # at the low end of the last code word
            group_scale = half2.load_lanes(p_words, o_unit * LOADS + (LOADS - 1)).to(tl.int32) >> (LOAD // 2)
            group_scale &= (1 << SCALE_BITS) - 1
        if DOT:
            factor = group_scale.to(tl.float16)
            factor = half2.join(factor, factor)
        p_block = p_x + block * (QUADS * STEP)
        before = tl.zeros([1, BLOCK_N, UNITS], tl.int32)  # the first pair of a quad
        total = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
        for load in tl.static_range(LOADS):
            words = half2.load_lanes(p_words, o_unit * LOADS + load)
            for i in tl.static_range(LOADED):
                if LOAD == 16:
                    pair = half2.permute_bytes(words.to(tl.int32), tl.zeros([1, 1, 1], tl.int32), 0x4140, PTX)
                elif LOAD == 32:
                    pair = words
                else:
                    pair = _cluster_pair((words >> (32 * (i // 2))).to(tl.int32), i % 2, code_scale, code_zero, PTX)
                chain = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
                for slot in tl.static_range(SLOTS):
                    if ((load * LOADED + i) * SLOTS + slot) % 2 == 0:
                        quad = half2.load_lanes(p_block, ((load * LOADED + i) * SLOTS + slot) // 2 * STEP)
                        x = quad.to(tl.int32)
                    else:
                        x = (quad >> 32).to(tl.int32)
                    weight = _weight_pair(pair, (SHIFTS >> (4 * slot)) & 15, WINDOW, PTX)
                    if DOT:
                        weight = half2.mul2(weight, factor, PTX)  # exact
                        if ((load * LOADED + i) * SLOTS + slot) % 2 == 1:
                            acc = half2.dot4(acc, before, weight, quad, PTX)
                        before = weight
                    else:
                        chain = half2.fma2(weight, x, chain, PTX)
                if not DOT:
                    total = half2.add2(total, chain, PTX)
        if DOT:
            if LOADS * LOADED * SLOTS % 2 == 1:  # the second pair of the last quad is undefined
                acc = half2.dot4(acc, before, before, quad & 0xFFFFFFFF, PTX)
        else:
            x_scale = half2.load_lanes(p_x_scale, block * UNITS)
            acc = tl.fma(half2.sum2(total), group_scale.to(tl.float32) * x_scale, acc)

    scale = tl.reshape(scale, [BLOCK_N]) * 1024
    if DOT:
        out = half2.dot_result(acc, scale, p_x_scale)
    else:
        out = tl.sum(acc, 2) * scale[None, :]
    half2.store_product(p_out, out, o_row, tokens, rows, T)


@triton.jit
def _weight_pair(pair, SHIFT: tl.constexpr, WINDOW: tl.constexpr, PTX: tl.constexpr):
    """The weights whose windows start at bit `SHIFT` of the two code words in `pair`, as float16, divided by 1024."""
    # The float16 1024 + m has m in its low ten bits. Windows that reach above those are shifted down, by the same
    # amount wherever possible, so that they share the shift.
    DOWN: tl.constexpr = 0 if SHIFT + WINDOW <= 10 else (9 if WINDOW == 3 else 6)
    UP: tl.constexpr = SHIFT - DOWN
    MASK: tl.constexpr = ((1 << WINDOW) - 1) << UP
    magic = ((pair >> DOWN) & (MASK * 0x10001)) | 0x64006400
    STEP: tl.constexpr = 2.0**-UP / 1024
    START: tl.constexpr = -(1024.0 * 2.0**-UP + 2 ** (WINDOW - 1)) / 1024
    return half2.fma2(magic, half2.constant2(STEP), half2.constant2(START), PTX)


@triton.jit
def _cluster_pair(bytes, i: tl.constexpr, code_scale, code_zero, PTX: tl.constexpr):
    """The code words of bytes `2i` and `2i + 1`."""
    first = ((bytes >> (16 * i)) & 0xFF).to(tl.float32) * code_scale + code_zero + 0.5
    second = ((bytes >> (16 * i + 8)) & 0xFF).to(tl.float32) * code_scale + code_zero + 0.5
    return half2.permute_bytes(half2.floor_bits(first, PTX), half2.floor_bits(second, PTX), 0x5410, PTX)


class CcqKernels(FormatKernels[CcqWeight]):
    """Each lane takes a group of 64 inputs at a time."""

    matmul_kernel, dequantize_kernel = matmul_kernel, dequantize_kernel
    lane_inputs = 64
    product_multiple = 64

    def operands(self, weight: CcqWeight) -> dict[str, Tensor]:
        return {
            "p_weight": weight.words,
            "p_scale": weight.scale,
            "p_local": given(weight.local_scale, weight.weight),
            "p_code_scale": given(weight.code_scale, weight.scale),
            "p_code_zero": given(weight.code_zero, weight.scale),
        }

    def constants(self, weight: CcqWeight) -> dict[str, Any]:
        layout = weight.layout
        return {
            "WINDOW": layout.window_bits,
            "SHIFTS": sum(shift << 4 * slot for slot, shift in enumerate(layout.shifts)),  # four bits each
            "SLOTS": len(layout.shifts),
            "WORDS": layout.words,
            "SCALE_BITS": layout.scale_bits,
        }

    def order(self, name: str, units: int, dot: bool) -> Order:
        return Order(
            self.lane_inputs, len(ccq_layout(name.removeprefix("ccq-")).shifts), units, TOGETHER if dot else 1
        )

    def block_n(self, name: str) -> tuple[int, ...]:
        return (4, 8)
