"""The rotation of activations, alone or combined with reordering them into the layout that a product reads.

Each thread of a product takes one *unit* of inputs at a time: 32 inputs (PCDVQ), a group of 64 (CCQ), a span of 1024
(`stream`; with matrix units, 4). `prepare_kernel` therefore rotates the activations and stores them in blocks of UNITS units as

    int64 [T, blocks, QUADS, UNITS]     four float16: inputs that a thread needs in succession
    float32 [T, blocks UNITS]           the divisor of each unit

or, for matrix units, whose lanes take several tokens, in sets of TOGETHER tokens as

    int64 [T / TOGETHER, blocks, QUADS, TOGETHER, UNITS]
    float32 [T]                         the divisor of each token

so that adjacent threads read adjacent words. Activations are divided by powers of two, so that any fits float16. That of a unit
brings its largest magnitude to between 2^13 and 2^14. Matrix units sum over all units of a token, so its divisor does that to a
bound: the largest magnitude before the rotation, times the root of its size.

Input r of a unit belongs to code word r // SLOTS and is weight r % SLOTS in it. Two words are packed side by side in
an int32, and so are their activations: pair (word // 2) * SLOTS + slot, half word % 2; two pairs form a quad. With
one slot this is the natural order. Unused places hold zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .dependent_launch import let_next_launch

TILE = 1024  # inputs per program
TOGETHER = 8  # tokens whose activations one matrix takes, at least
CHUNK = 8192  # inputs that a program looks at together for the largest magnitude of a token


@dataclass(frozen=True)
class Order:
    """The order in which a product reads its activations."""

    unit: int  # inputs per unit, a divisor of TILE
    slots: int  # weights per code word
    units: int  # units per block
    together: int = 1  # tokens per set; more than one for matrix units

    @property
    def matrix(self) -> bool:
        """Whether matrix units read it."""
        return self.together > 1

    @property
    def places(self) -> int:
        """Places per unit: its inputs, plus zeros to complete the last pair of words."""
        return -(-self.unit // (2 * self.slots)) * 2 * self.slots

    @property
    def quads(self) -> int:
        """Int64 words per unit."""
        return -(-self.places // 4)

    def blocks(self, columns: int) -> int:
        """Number of blocks that hold `columns` inputs."""
        return -(-columns // (self.unit * self.units))

    def stored(self, tokens: int) -> int:
        """The number of tokens that are stored: the last one is repeated to complete a set."""
        return -(-tokens // self.together) * self.together

    def words(self, tokens: int, columns: int) -> int:
        """Int64 words of all tokens."""
        return self.stored(tokens) * self.blocks(columns) * self.quads * self.units

    def scales(self, tokens: int, columns: int) -> int:
        """Number of divisors."""
        return tokens if self.matrix else tokens * self.blocks(columns) * self.units


@triton.jit
def _rotate(x, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Hadamard transform, in Sylvester's order, of every `BLOCK` of `TILE` values, times 1 / sqrt(BLOCK)."""
    for step in tl.static_range(16):  # enough for any block: see MAX_BLOCK
        if (1 << step) < BLOCK:
            pairs = tl.reshape(x, [TILE // (2 << step), 2, 1 << step])
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
            x = tl.reshape(pairs, [TILE])
    return x * (BLOCK**-0.5)


@triton.jit
def hadamard_kernel(
    p_x,  # floating [T, K]
    p_signs,  # float32 [BLOCK]
    p_out,  # like x
    numbers,  # T * K
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(p_x + o, mask=o < numbers, other=0.0).to(tl.float32)
    signs = tl.load(p_signs + tl.arange(0, TILE) % BLOCK)
    if INVERSE:
        x = _rotate(x, TILE, BLOCK) * signs
    else:
        x = _rotate(x * signs, TILE, BLOCK)
    tl.store(p_out + o, x, mask=o < numbers)


@triton.jit
def prepare_kernel(
    p_x,  # floating [T, K]
    p_signs,  # float32 [BLOCK], unless BLOCK is 1
    p_out,  # float16 [T / TOGETHER, blocks, QUADS, TOGETHER, UNITS, 4]
    p_scale,  # float32 [T, blocks UNITS]; for matrix units, [T]
    tokens,  # T
    columns,  # K
    blocks,
    BLOCK: tl.constexpr,  # of the rotation
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    QUADS: tl.constexpr,
    UNITS: tl.constexpr,
    TOGETHER: tl.constexpr,  # more than one for matrix units
    PDL: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # used for matrix units
):
    let_next_launch(PDL)  # a product, which waits
    token = tl.program_id(0).to(tl.int64)
    o_input = tl.program_id(1) * TILE + tl.arange(0, TILE)
    p_x += tl.minimum(token, tokens - 1) * columns  # the last token completes its set
    x = tl.load(p_x + o_input, mask=o_input < columns, other=0.0).to(tl.float32)
    if BLOCK > 1:
        x = _rotate(x * tl.load(p_signs + tl.arange(0, TILE) % BLOCK), TILE, BLOCK)

    unit = tl.reshape(x, [TILE // UNIT, UNIT])
    o_unit = tl.program_id(1) * (TILE // UNIT) + tl.arange(0, TILE // UNIT)
    exists = o_unit < blocks * UNITS
    if TOGETHER > 1:
        factor, divisor = _powers_of_two(_largest(p_x, columns, CHUNK) * BLOCK**0.5)
        unit = unit * factor
        tl.store(p_scale + token, divisor, mask=(tl.program_id(1) == 0) & (token < tokens))
    else:
        factor, divisor = _powers_of_two(tl.max(tl.abs(unit), 1))
        unit = unit * factor[:, None]
        tl.store(p_scale + token * blocks * UNITS + o_unit, divisor, mask=exists)

    o_unit, exists = o_unit[:, None], exists[:, None]
    p_out += (token // TOGETHER * blocks * QUADS * TOGETHER + token % TOGETHER) * (UNITS * 4)
    o_place = _place(o_unit, tl.arange(0, UNIT)[None, :], SLOTS, QUADS, TOGETHER, UNITS)
    tl.store(p_out + o_place, unit, mask=exists)
    if PLACES > UNIT:
        o_rest = UNIT + tl.arange(0, 8)[None, :]
        o_place = _place(o_unit, o_rest, SLOTS, QUADS, TOGETHER, UNITS)
        tl.store(p_out + o_place, tl.zeros([TILE // UNIT, 8], tl.float32), mask=exists & (o_rest < PLACES))


@triton.jit
def _largest(p_x, columns, CHUNK: tl.constexpr):
    """The largest magnitude of a token."""
    largest = tl.zeros([CHUNK], tl.float32)
    for start in range(0, columns, CHUNK):
        o_input = start + tl.arange(0, CHUNK)
        x = tl.load(p_x + o_input, mask=o_input < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    return tl.max(largest, 0)


@triton.jit
def _powers_of_two(largest):
    """The power of two that brings `largest` to between 2^13 and 2^14, and its inverse."""
    # The biased exponent, as stored in a float32.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 14)
    factor = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
    return factor, ((exponent - 13) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _place(unit, r, SLOTS: tl.constexpr, QUADS: tl.constexpr, TOGETHER: tl.constexpr, UNITS: tl.constexpr):
    """The offset at which input `r` of a unit is stored, among those of its set of tokens."""
    word, slot = r // SLOTS, r % SLOTS
    pair = word // 2 * SLOTS + slot
    quad = (unit // UNITS * QUADS + pair // 2) * TOGETHER * UNITS + unit % UNITS
    return quad * 4 + pair % 2 * 2 + word % 2
