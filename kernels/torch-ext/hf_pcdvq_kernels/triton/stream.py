"""Decoding of the CCQ `stream` layout in Triton. The format is documented in `hf_pcdvq/codecs/stream.py`.

`matmul_kernel` takes pairs of inputs, and for each input the bits of 8 or 16 output channels as one 64-bit value, so
that the shifts of all windows are compile-time constants. For matrix units, eight such sets of channels lie in adjacent lanes, and
their first channels are the first rows of the unit's matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.stream import STREAM_MULTIPLIER, STREAM_RING, StreamWeight
from . import half2, tiles
from .activations import TOGETHER, Order
from .dependent_launch import wait_for_inputs
from .format_kernels import FormatKernels

# Pairs of inputs that a thread accumulates in float16 before adding to a float32 sum.
CHAIN = tl.constexpr(16)
SPAN = tl.constexpr(32 * 16)  # pairs of inputs whose activations share a scale


@triton.jit
def decode(
    p_weight,  # int32 [words, K]
    p_scale,  # float32 [N]
    row,  # int32 [ROWS, 1, 1], valid rows of the weight
    start,  # first column, a multiple of 64
    columns,  # K
    words,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    CYCLE: tl.constexpr,
    CYCLE_BITS: tl.constexpr,
    ENDS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    RING: tl.constexpr,
    PTX: tl.constexpr,
):
    """Weights as float32 [ROWS, COLUMNS, 1]; columns past the end repeat the last ones."""
    RING_WORDS: tl.constexpr = RING // CYCLE * CYCLE_BITS // 32
    o_column = tl.minimum(start + tl.arange(0, COLUMNS), columns - 1)[None, :, None]
    channel = row % RING
    end = channel // CYCLE * CYCLE_BITS + ((ENDS >> (channel % CYCLE * 8)) & 255)
    word = (end - 1) // 32
    first = row // RING * RING_WORDS
    ring_words = tl.minimum(RING_WORDS, words - first)
    before = tl.where(word == 0, ring_words, word) - 1
    low = tl.load(p_weight + (first + word).to(tl.int64) * columns + o_column)
    high = tl.load(p_weight + (first + before).to(tl.int64) * columns + o_column)
    window = _funnel(high, low, 32 * (word + 1) - end) & ((1 << WINDOW) - 1)
    return half2.sum_bytes(window * MULTIPLIER, 0, PTX).to(tl.float32) * tl.load(p_scale + row)


@triton.jit
def dequantize_kernel(
    p_out,  # floating [stop - first, K]
    p_weight,
    p_scale,
    first,  # first row
    stop,  # row after the last
    columns,  # K
    words,
    WINDOW: tl.constexpr,
    CYCLE: tl.constexpr,
    CYCLE_BITS: tl.constexpr,
    ENDS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):
    row, start = tiles.tile_rows(first, stop, ROWS), tiles.tile_start(COLUMNS)
    weight = decode(
        p_weight, p_scale, row, start, columns, words, COLUMNS, WINDOW, CYCLE, CYCLE_BITS, ENDS, MULTIPLIER, RING, PTX
    )
    tiles.store_tile(p_out, weight, first, stop, columns, ROWS, COLUMNS)


@triton.jit
def matmul_kernel(
    p_x,  # int32 [G T, S SPAN], pairs of activations in natural order, padded to whole spans; if DOT, quads in sets of tokens
    p_x_scale,  # float32 [G T, S]; [G T] if DOT
    p_weight,  # int32 [words, K]
    p_scale,  # float32 [N]
    p_experts,  # int32 [G], if GROUPED: index of each group's weight in the stacked tensors; outside of them: none
    p_out,  # floating [SPLIT, G, T, N]
    tokens,  # per group
    rows,  # N
    columns,  # K
    words,
    stack,  # number of weights in the stacked tensors; 1 without a stack
    span,  # blocks of UNITS CHAIN pairs of inputs per split; if DOT, of 2 UNITS
    WINDOW: tl.constexpr,
    CYCLE: tl.constexpr,
    CYCLE_BITS: tl.constexpr,
    ENDS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    RING: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHANNELS: tl.constexpr,  # output channels whose bits fit a 64-bit value
    UNITS: tl.constexpr,
    DOT: tl.constexpr,  # use matrix units, see `half2.dot4`, instead of accumulating products of float16 pairs
    PTX: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent_launch.py`
    GROUPED: tl.constexpr,  # G products with weights of a stack, along the third grid axis
):
    wait_for_inputs(PDL)
    BITS: tl.constexpr = CHANNELS // CYCLE * CYCLE_BITS  # new bits of the channels
    RING_WORDS: tl.constexpr = RING // CYCLE * CYCLE_BITS // 32
    o_channel = tl.arange(0, CHANNELS)[None, :, None]
    shift = BITS - o_channel // CYCLE * CYCLE_BITS - ((ENDS >> (o_channel % CYCLE * 8)) & 255)

    # For every set of channels, the word in which their bits end and the two before it in the ring.
    SETS: tl.constexpr = BLOCK_N // CHANNELS
    start = (tl.program_id(0) * BLOCK_N + CHANNELS * tl.arange(0, SETS))[:, None, None]
    start = tl.minimum(start, (rows - 1) // CHANNELS * CHANNELS)
    ring = start // RING
    ring_words = tl.minimum(RING_WORDS, words - ring * RING_WORDS)
    end = (start - ring * RING) // CYCLE * CYCLE_BITS + BITS
    last = (end + 31) // 32 - 1
    down = 32 * (last + 1) - end
    pairs = columns // 2
    expert, wanted = half2.group_expert(p_experts, stack, GROUPED)
    p_weight += expert * words * columns
    p_scale += expert * rows
    p_ring = p_weight.to(tl.pointer_type(tl.int64)) + (ring * RING_WORDS).to(tl.int64) * pairs
    p_word0 = p_ring + last.to(tl.int64) * pairs
    p_word1 = p_ring + ((last + 2 * ring_words - 1) % ring_words).to(tl.int64) * pairs
    p_word2 = p_ring + ((last + 2 * ring_words - 2) % ring_words).to(tl.int64) * pairs

    BLOCK: tl.constexpr = UNITS * (2 if DOT else CHAIN)
    spans = tl.cdiv(pairs, SPAN)
    if DOT:
        blocks = tl.cdiv(pairs, BLOCK)
        p_quads = p_x.to(tl.pointer_type(tl.int64))
        p_quads, p_x_scale = half2.activation_pointers(p_quads, p_x_scale, tokens, blocks, 1, T, UNITS, DOT)
    else:
        o_token = half2.group_token(tokens, T)[:, None, None]
        p_x += o_token.to(tl.int64) * spans * SPAN
        p_x_scale += o_token * spans
    # Channels of the same place in their sets follow one another.
    o_row = tl.arange(0, BLOCK_N)
    o_row = tl.program_id(0) * BLOCK_N + o_row % SETS * CHANNELS + o_row // SETS
    scale = tl.load(p_scale + tl.minimum(o_row, rows - 1)) * 8192

    acc = tl.zeros([BLOCK_N, T] if DOT else [T, BLOCK_N, UNITS], tl.float32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, tl.cdiv(pairs, BLOCK))
    if GROUPED:
        stop = tl.where(wanted, stop, begin)
    if DOT:
        for block in range(begin, stop):
            acc = _dot_block(
                acc, p_quads, p_word0, p_word1, p_word2, block, pairs, shift, down,
                BITS, WINDOW, MULTIPLIER, BLOCK_N, UNITS, PTX,
            )  # fmt: skip
    else:
        full = tl.minimum(stop, pairs // BLOCK)
        # Full blocks need no masks.
        for block in range(begin, full):
            acc = _add_block(
                acc, p_x, p_x_scale, p_word0, p_word1, p_word2, block, pairs, shift, down,
                BITS, WINDOW, MULTIPLIER, T, BLOCK_N, UNITS, True, PTX,
            )  # fmt: skip
        for block in range(full, stop):
            acc = _add_block(
                acc, p_x, p_x_scale, p_word0, p_word1, p_word2, block, pairs, shift, down,
                BITS, WINDOW, MULTIPLIER, T, BLOCK_N, UNITS, False, PTX,
            )  # fmt: skip

    if DOT:
        out = half2.dot_result(acc, scale, p_x_scale)
    else:
        out = tl.sum(acc, 2) * scale[None, :]
    half2.store_product(p_out, out, o_row, tokens, rows, T)


@triton.jit
def _add_block(
    acc,
    p_x,
    p_x_scale,
    p_word0,
    p_word1,
    p_word2,
    block,
    pairs,
    shift,
    down,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    FULL: tl.constexpr,
    PTX: tl.constexpr,
):
    """`acc` plus the products of `UNITS * CHAIN` pairs of inputs, all of which exist if `FULL`."""
    # One element per thread: threads holding several adjacent ones would have a different layout than the sums. A
    # warp covers whole spans of activations, each with one scale.
    o_lane = tl.max_contiguous(tl.arange(0, UNITS), 1)
    o_span = block * (UNITS // 32) + o_lane // 32
    o_first = (o_span * SPAN + o_lane % 32)[None, None, :]
    o_span = o_span[None, None, :]
    chain = tl.zeros([T, BLOCK_N, UNITS], tl.int32)
    for i in tl.static_range(CHAIN):
        o_pair = o_first + i * 32
        if FULL:
            x = half2.load_lanes(p_x, o_pair)
        else:  # weights past the end repeat the last ones, and meet activations of zero
            x = half2.load_lanes(p_x, o_pair, mask=o_pair < pairs, other=0)
            o_pair = tl.minimum(o_pair, pairs - 1)
        weight = _weights(p_word0, p_word1, p_word2, o_pair, down, shift, BITS, WINDOW, MULTIPLIER, PTX)
        chain = half2.fma2(weight, x, chain, PTX)
    x_scale = half2.load_lanes(p_x_scale, o_span, mask=o_span * SPAN < pairs, other=0.0)
    return tl.fma(half2.sum2(chain), x_scale, acc)


@triton.jit
def _dot_block(
    acc,
    p_quads,
    p_word0,
    p_word1,
    p_word2,
    block,
    pairs,
    shift,
    down,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """`acc` [BLOCK_N, T] plus the products of `UNITS` quads of inputs, which are pairs of pairs."""
    o_quad = block * UNITS + tl.max_contiguous(tl.arange(0, UNITS), 1)
    # Weights past the end repeat the last ones, and meet activations of zero.
    first = tl.minimum(2 * o_quad, pairs - 1)[None, None, :]
    second = tl.minimum(2 * o_quad + 1, pairs - 1)[None, None, :]
    first = _weights(p_word0, p_word1, p_word2, first, down, shift, BITS, WINDOW, MULTIPLIER, PTX)
    second = _weights(p_word0, p_word1, p_word2, second, down, shift, BITS, WINDOW, MULTIPLIER, PTX)
    quad = half2.load_lanes(p_quads, block * (UNITS * half2.TOGETHER))
    return half2.dot4(acc, _as_rows(first, BLOCK_N), _as_rows(second, BLOCK_N), quad, PTX)


@triton.jit
def _as_rows(pairs, BLOCK_N: tl.constexpr):
    """[SETS, CHANNELS, UNITS] as [1, BLOCK_N, UNITS], channels of the same place in their sets one after the other."""
    return tl.reshape(tl.permute(pairs, (1, 0, 2)), [1, BLOCK_N, pairs.shape[2]])


@triton.jit
def _weights(
    p_word0,
    p_word1,
    p_word2,
    o_pair,
    down,
    shift,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    PTX: tl.constexpr,
):
    """Weights of pairs of inputs, as pairs of float16, divided by 8192 [SETS, CHANNELS, UNITS]."""
    word0, word1 = half2.load_lanes(p_word0, o_pair), half2.load_lanes(p_word1, o_pair)
    word2 = word1 if BITS == 32 else half2.load_lanes(p_word2, o_pair)  # 32 bits end with a word
    even = _values(
        word0.to(tl.int32), word1.to(tl.int32), word2.to(tl.int32), down, shift, BITS, WINDOW, MULTIPLIER, PTX
    )
    word0, word1, word2 = word0 >> 32, word1 >> 32, word2 >> 32
    odd = _values(
        word0.to(tl.int32), word1.to(tl.int32), word2.to(tl.int32), down, shift, BITS, WINDOW, MULTIPLIER, PTX
    )
    weight = half2.permute_bytes(even, odd, 0x5410, PTX)
    # From 1536 + value to value / 8192.
    return half2.fma2(weight, half2.constant2(2.0**-13), half2.constant2(-1536 * 2.0**-13), PTX)


@triton.jit
def _values(
    word0,
    word1,
    word2,
    down,
    shift,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    PTX: tl.constexpr,
):
    """Int32 whose low halves are the float16 of 1536 plus the values of the windows.

    The windows start at bit `shift` of the bit string whose lowest bit is bit `down` of `word0` and which continues
    in `word1` and `word2`, the preceding words.
    """
    if BITS == 32:
        low, high = word0, word1
    else:
        low, high = _funnel(word1, word0, down), _funnel(word2, word1, down)
    window = _funnel(high, low, shift) & ((1 << WINDOW) - 1)
    return half2.sum_bytes(window * MULTIPLIER, 0x6600, PTX)


@triton.jit
def _funnel(high, low, down):
    """The low 32 bits of the 64-bit value `high:low` shifted right by `down`."""
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return (both >> down).to(tl.int32)


class StreamKernels(FormatKernels[StreamWeight]):
    """Each lane takes CHAIN pairs of inputs at a time, which are not loaded together, and a quad for matrix units."""

    matmul_kernel, dequantize_kernel = matmul_kernel, dequantize_kernel
    lane_inputs = 2 * CHAIN.value
    dot_lane_inputs = 4
    product_multiple = 2
    activation_dtype = torch.int32

    def operands(self, weight: StreamWeight) -> dict[str, Tensor]:
        return {"p_weight": weight.weight, "p_scale": weight.scale}

    def constants(self, weight: StreamWeight) -> dict[str, Any]:
        layout = weight.layout
        cycle = len(layout.strides)
        return {
            "WINDOW": layout.window_bits,
            "CYCLE": cycle,  # channels after which the strides repeat
            "CYCLE_BITS": sum(layout.strides),
            "ENDS": sum(end << 8 * i for i, end in enumerate(layout.ends[:cycle])),  # of the windows, eight bits each
            "MULTIPLIER": STREAM_MULTIPLIER - (1 << 32),  # as int32
            "RING": STREAM_RING,
        }

    def matmul_constants(self, weight: StreamWeight, block_n: int, dot: bool) -> dict[str, Any]:
        return {**self.constants(weight), "CHANNELS": block_n // 8 if dot else block_n}

    def matmul_sizes(self, weight: StreamWeight) -> dict[str, int]:
        return self.dequantize_sizes(weight)

    def dequantize_sizes(self, weight: StreamWeight) -> dict[str, int]:
        return {"columns": weight.columns, "words": len(weight.weight)}

    def order(self, name: str, units: int, dot: bool) -> Order:
        return (
            Order(4, 1, units, TOGETHER) if dot else Order(2 * SPAN.value, 1, 1)
        )  # spans do not depend on the number of lanes

    def block_n(self, name: str) -> tuple[int, ...]:
        # As many output channels as fit their windows in a 64-bit value.
        return (8,) if name == "stream-4.0" else (8, 16)

    def dot_block_n(self, name: str) -> tuple[int, ...]:
        return (64, 32)
