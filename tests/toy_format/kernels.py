"""The toy format in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from . import half2, tiles
from .dependent_launch import wait_for_inputs
from .format_kernels import FormatKernels


@triton.jit
def dequantize_kernel(
    p_out,
    p_weight,  # uint8 [N, K / 2]
    p_scale,  # float32 [N]
    first,
    stop,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):
    row = tiles.tile_rows(first, stop, ROWS)
    o_column = tl.minimum(tiles.tile_start(COLUMNS) + tl.arange(0, COLUMNS), columns - 1)[None, :, None]
    byte = tl.load(p_weight + row.to(tl.int64) * (columns // 2) + o_column // 2).to(tl.int32)
    value = ((byte >> (o_column % 2 * 4)) & 15) - 8
    tiles.store_tile(p_out, value.to(tl.float32) * tl.load(p_scale + row), first, stop, columns, ROWS, COLUMNS)


@triton.jit
def matmul_kernel(
    p_x,  # int64 [G T, U / UNITS, 8, UNITS]; if DOT, in sets of tokens: see `activations.py`
    p_x_scale,  # float32 [G T, U]; [G T] if DOT
    p_weight,  # uint8 [N, 16 U]
    p_scale,  # float32 [N]
    p_experts,
    p_out,
    tokens,
    rows,
    units,  # U = K / 32
    stack,
    span,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    GROUPED: tl.constexpr,
):
    wait_for_inputs(PDL)
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, wanted = half2.group_expert(p_experts, stack, GROUPED)
    row = (expert * rows + tl.minimum(o_row, rows - 1))[None, :, None]
    o_lane = tl.max_contiguous(tl.arange(0, UNITS), 1)[None, None, :]
    blocks = tl.cdiv(units, UNITS)
    STEP: tl.constexpr = UNITS * half2.TOGETHER if DOT else UNITS
    p_x, p_x_scale = half2.activation_pointers(p_x, p_x_scale, tokens, blocks, 8, T, UNITS, DOT)
    scale = tl.load(p_scale + row)
    acc = tl.zeros([BLOCK_N, T] if DOT else [T, BLOCK_N, UNITS], tl.float32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, blocks)
    if GROUPED:
        stop = tl.where(wanted, stop, begin)
    for block in range(begin, stop):
        o_unit = tl.minimum(block * UNITS + o_lane, units - 1)  # past the end, activations are zero
        total = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
        for i in tl.static_range(8):
            p_bytes = p_weight + (row * units + o_unit) * 16 + 2 * i
            first, second = _pair(tl.load(p_bytes).to(tl.int32)), _pair(tl.load(p_bytes + 1).to(tl.int32))
            quad = half2.load_lanes(p_x, (block * 8 + i) * STEP)
            if DOT:
                acc = half2.dot4(acc, first, second, quad, PTX)
            else:
                total = half2.fma2(first, quad.to(tl.int32), total, PTX)
                total = half2.fma2(second, (quad >> 32).to(tl.int32), total, PTX)
        if not DOT:
            acc = tl.fma(half2.sum2(total), tl.load(p_x_scale + block * UNITS), acc)
    scale = tl.reshape(scale, [BLOCK_N]) * 256
    if DOT:
        out = half2.dot_result(acc, scale, p_x_scale)
    else:
        out = tl.sum(acc, 2) * scale[None, :]
    half2.store_product(p_out, out, o_row, tokens, rows, T)


@triton.jit
def _pair(byte):
    """The two weights of a byte, divided by 2^8, so that sums of products fit float16."""
    first, second = ((byte & 15) - 8).to(tl.float16), ((byte >> 4) - 8).to(tl.float16)
    return half2.join(first * 0.00390625, second * 0.00390625)


class ToyKernels(FormatKernels):
    matmul_kernel, dequantize_kernel = matmul_kernel, dequantize_kernel
    lane_inputs = 32
    product_multiple = 32

    def operands(self, weight):
        return {"p_weight": weight.weight, "p_scale": weight.scale}

    def constants(self, weight):
        return {}

    def block_n(self, name):
        return (4,)
