"""Arithmetic on pairs of float16 held in an int32, low half first.

NVIDIA GPUs multiply and add such a pair in one instruction that Triton does not expose, so with `PTX` set these
functions are one PTX instruction each. Without it they are plain Triton, for all other devices and the interpreter,
and compute bit-identical results, except that a multiply-add may round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations
from .device import TRITON

# Before Triton 3.8, a lane held four adjacent inputs of a product of 16-bit floats, since then two and two.
QUADS_ADJACENT = tl.constexpr(TRITON < (3, 8))
TOGETHER = tl.constexpr(activations.TOGETHER)


@triton.jit
def low(pair):
    """The low float16 of every pair."""
    return pair.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high(pair):
    """The high float16 of every pair."""
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def join(a, b):
    """Pack two float16 into a pair, `a` low."""
    return (a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def fma2(a, b, c, PTX: tl.constexpr):
    """`a * b + c`, half by half."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:  # products of float16 are exact in float32
        first = low(a).to(tl.float32) * low(b).to(tl.float32) + low(c).to(tl.float32)
        second = high(a).to(tl.float32) * high(b).to(tl.float32) + high(c).to(tl.float32)
        out = join(first.to(tl.float16), second.to(tl.float16))
    return out


@triton.jit
def add2(a, b, PTX: tl.constexpr):
    """`a + b`, half by half."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = join(low(a) + low(b), high(a) + high(b))
    return out


@triton.jit
def constant2(value: tl.constexpr):
    """A pair holding `value` twice, which must be exact in float16; broadcasts against anything."""
    number = tl.full([1, 1, 1], value, tl.float16)
    return join(number, number)


@triton.jit
def sum2(pair):
    """The sum of both halves as float32."""
    return low(pair).to(tl.float32) + high(pair).to(tl.float32)


@triton.jit
def mul2(a, b, PTX: tl.constexpr):
    """`a * b`, half by half."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = join(low(a) * low(b), high(a) * high(b))
    return out


@triton.jit
def pairs_of(quad, PTX: tl.constexpr):
    """The two pairs of an int64, the low one first."""
    if PTX:  # known to be two registers, of which halves are taken without a shift
        first, second = tl.inline_asm_elementwise(
            "mov.b64 {$0, $1}, $2;", "=r,=r,l", [quad], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        first, second = quad.to(tl.int32), (quad >> 32).to(tl.int32)
    return first, second


@triton.jit
def dot4(acc, first, second, quad, PTX: tl.constexpr):
    """`acc` [BLOCK_N, T] plus products of quads of inputs, by matrix units.

    The weights of a quad are two pairs of float16 [1, BLOCK_N, UNITS], its activations four float16 in an int64 [UNITS, T]. With
    four units, one warp and `load_lanes`, every lane of an NVIDIA GPU holds the weights and activations that its matrix
    unit wants from it, so that nothing is exchanged. In which order the inputs of a product are counted is free, and follows the
    order in which Triton assigns them to lanes.
    """
    BLOCK_N: tl.constexpr = first.shape[1]
    UNITS: tl.constexpr = first.shape[2]
    T: tl.constexpr = acc.shape[1]
    weights = tl.join(tl.join(low(first), low(second)), tl.join(high(first), high(second)))
    one, other = pairs_of(quad, PTX)
    inputs = tl.join(tl.join(low(one), low(other)), tl.join(high(one), high(other)))
    # Now [1, BLOCK_N, UNITS, 2 pairs, 2] and [UNITS, T, 2 pairs, 2].
    if QUADS_ADJACENT:
        inputs = tl.permute(inputs, (0, 2, 3, 1))
    else:
        weights, inputs = tl.permute(weights, (0, 1, 3, 2, 4)), tl.permute(inputs, (2, 0, 3, 1))
    return tl.dot(tl.reshape(weights, [BLOCK_N, 4 * UNITS]), tl.reshape(inputs, [4 * UNITS, T]), acc)


@triton.jit
def permute_bytes(a, b, SELECT: tl.constexpr, PTX: tl.constexpr):
    """Four of the eight bytes of `a` (bytes 0 to 3) and `b` (4 to 7); nibble i of `SELECT` selects byte i."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, tl.full([1, 1, 1], SELECT, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        out = _byte(a, b, SELECT & 15)
        for i in tl.static_range(1, 4):
            out |= _byte(a, b, (SELECT >> (4 * i)) & 15) << (8 * i)
    return out


@triton.jit
def _byte(a, b, INDEX: tl.constexpr):
    # Adding zero gives both cases the broadcast shape of `a` and `b`.
    byte = (a >> (8 * INDEX)) + b * 0 if INDEX < 4 else a * 0 + (b >> (8 * (INDEX - 4)))
    return byte & 0xFF


@triton.jit
def select_bytes(a, select, PTX: tl.constexpr):
    """Byte i of the result is the byte of `a` that nibble i of `select` (0 to 3) selects."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, $2;", "=r,r,r", [a, select], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = a * 0
        for i in tl.static_range(4):
            out |= ((a >> (((select >> (4 * i)) & 3) * 8)) & 0xFF) << (8 * i)
    return out


@triton.jit
def select_half(a, b, index, PTX: tl.constexpr):
    """Both halves of the result are half number `index` (0 to 3) of `a` (halves 0 and 1) and `b` (2 and 3)."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, index * 0x2222 + 0x1010],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        half = (tl.where(index < 2, a, b) >> ((index & 1) * 16)) & 0xFFFF
        out = half | (half << 16)
    return out


@triton.jit
def parity(x, PTX: tl.constexpr):
    """An int32 whose lowest bit is the parity of the 7-bit integer `x`."""
    if PTX:
        out = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        out = x ^ (x >> 1) ^ (x >> 2) ^ (x >> 3) ^ (x >> 4) ^ (x >> 5) ^ (x >> 6)
    return out


@triton.jit
def sum_bytes(x, start: tl.constexpr, PTX: tl.constexpr):
    """`start` plus the four bytes of `x`, each as a signed integer."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [x, tl.full([1, 1, 1], 0x01010101, tl.int32), tl.full([1, 1, 1], start, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        out = start + (x >> 24) + ((x << 8) >> 24) + ((x << 16) >> 24) + ((x << 24) >> 24)
    return out


@triton.jit
def floor_bits(x, PTX: tl.constexpr):
    """An int32 whose low 16 bits are those of floor(`x`), for |`x`| < 2^22."""
    if PTX:
        # 1.5 * 2^23: floats of this size have a unit in the last place of 1, so adding it, rounding down, leaves the
        # floor in the low bits.
        out = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B400000;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = tl.floor(x).to(tl.int32)
    return out


@triton.jit
def table_entry(p_table, index, PTX: tl.constexpr):
    """Entry `index` of a read-only int64 table."""
    if PTX:
        # One multiply-add for the address; the compiler would mask, shift and add with carry.
        out = tl.inline_asm_elementwise(
            "{ .reg .b64 p; mad.wide.u32 p, $1, 8, $2; ld.global.nc.b64 $0, [p]; }",
            "=l,r,l",
            [index, p_table.to(tl.int64)],
            dtype=tl.int64,
            is_pure=True,
            pack=1,
        )
    else:
        out = tl.load(p_table + index)
    return out


@triton.jit
def load_lanes(pointers, offset, mask=None, other=None):
    """Load `pointers + offset`, [.., .., UNITS], adjacent threads along the last axis; or for `dot4`, [UNITS, T], along the first.

    Loads with different layouts would be exchanged through shared memory in the main loop. The compiler derives the
    layout of a load from what it knows of its addresses: it is told that they are adjacent along that axis (else
    some versions of Triton distribute threads along another one first), and that they are not aligned, so that no thread
    takes several. What a function is told of its arguments is lost, hence the sum.
    """
    pointers += offset
    if len(pointers.shape) == 3:
        pointers = tl.multiple_of(tl.max_contiguous(pointers, [1, 1, 2]), [1, 1, 1])
    else:
        pointers = tl.multiple_of(tl.max_contiguous(pointers, [2, 1]), [1, 1])
    return tl.load(pointers, mask=mask, other=other)


@triton.jit
def load_bytes(pointers, offset, PTX: tl.constexpr):
    """Load `pointers + offset` [.., .., UNITS], uint8, as int32.

    If a matrix depends on loads of bytes, versions of Triton before 3.8 assign eight adjacent inputs to a lane instead of four.
    They do not see this one.
    """
    if PTX:
        out = tl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];",
            "=r,l",
            [(pointers + offset).to(tl.int64)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        out = tl.load(pointers + offset).to(tl.int32)
    return out


@triton.jit
def per_lane_zero(like, PTX: tl.constexpr):
    """Int32 zeros in the shape of `like`, which the compiler assumes to differ between lanes.

    Values that depend on it stay in ordinary registers. A value known to be the same in all lanes goes to a uniform
    register, and is copied back every time a byte permutation or a 64-bit multiply-add uses it.
    """
    if PTX:
        # Bit 31 of %lanemask_lt, the mask of lower lanes, is zero in every lane.
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 m; mov.u32 m, %lanemask_lt; shr.u32 m, m, 31; and.b32 $0, m, $1; }",
            "=r,r",
            [like],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        out = like * 0
    return out


@triton.jit
def group_token(tokens, T: tl.constexpr):
    """Indices of the tokens of this program's group, [T]; past the end, the last one repeats."""
    return tl.program_id(2) * tokens + tl.minimum(tl.arange(0, T), tokens - 1)


@triton.jit
def group_expert(p_experts, stack, GROUPED: tl.constexpr):
    """Index of this program's weight in the stack, and whether its group has one; without a stack, 0 and true.

    An index outside the stack of `stack` weights means none, so that no other memory is read.
    """
    if GROUPED:
        expert = tl.load(p_experts + tl.program_id(2))
    else:
        expert = tl.full([], 0, tl.int32)
    wanted = (expert >= 0) & (expert < stack)
    return tl.where(wanted, expert, 0).to(tl.int64), wanted


@triton.jit
def activation_pointers(
    p_x, p_x_scale, tokens, blocks, QUADS: tl.constexpr, T: tl.constexpr, UNITS: tl.constexpr, DOT: tl.constexpr
):
    """Pointers to the first quads of this group's tokens, [T, 1, UNITS], and to their scales; if `DOT`, [UNITS, T] and [T]."""
    # One element per thread: threads holding several adjacent ones would have a different layout than the weights.
    o_lane = tl.max_contiguous(tl.arange(0, UNITS), 1)
    o_token = group_token(tokens, T)
    if DOT:
        p_x_scale += o_token
        o_token = o_token[None, :]
        o_set = (o_token // TOGETHER).to(tl.int64) * blocks * (QUADS * TOGETHER * UNITS)
        p_x += o_set + o_token % TOGETHER * UNITS + o_lane[:, None]
    else:
        o_lane, o_token = o_lane[None, None, :], o_token[:, None, None]
        p_x += o_token.to(tl.int64) * blocks * (QUADS * UNITS) + o_lane
        p_x_scale += o_token * blocks * UNITS + o_lane
    return p_x, p_x_scale


@triton.jit
def dot_result(acc, scale, p_x_scale):
    """The result [T, BLOCK_N] of sums [BLOCK_N, T]: times the scales of the rows [BLOCK_N] and of the tokens, whose pointers are [T]."""
    return tl.trans(acc) * scale[None, :] * tl.load(p_x_scale)[:, None]


@triton.jit
def store_product(p_out, out, o_row, tokens, rows, T: tl.constexpr):
    """Store `out` [T, BLOCK_N] as this split's and this group's part of [SPLIT, G, tokens, rows]."""
    o_token, o_row = tl.arange(0, T)[:, None], o_row[None, :]
    group = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    p_out += (group * tokens + o_token) * rows + o_row
    tl.store(p_out, out, mask=(o_token < tokens) & (o_row < rows))
