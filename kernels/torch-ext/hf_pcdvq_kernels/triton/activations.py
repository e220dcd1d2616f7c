"""The rotation of activations, alone or combined with reordering them into the layout that a product reads.

Each thread of a product takes one *unit* of inputs at a time: 32 inputs (PCDVQ), a group of 64 (CCQ), a span of 1024
(`stream`). `prepare_kernel` therefore rotates the activations and stores them in blocks of UNITS units as

    int64 [T, blocks, QUADS, UNITS]     four 16-bit floats: inputs that a thread needs in succession
    float32 [T, blocks UNITS]           if SCALE: the divisor of each unit

so that adjacent threads read adjacent words. For products of float16 pairs (SCALE) every unit is divided by a power
of two that brings its largest magnitude to between 2^13 and 2^14, so that any activation fits float16.

Input r of a unit belongs to code word r // SLOTS and is weight r % SLOTS in it. Two words are packed side by side in
an int32, and so are their activations: pair (word // 2) * SLOTS + slot, half word % 2; two pairs form a quad. With
one slot this is the natural order. Unused places hold zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

TILE = 1024  # inputs per program


@dataclass(frozen=True)
class Order:
    """The order in which a product reads its activations."""

    unit: int  # inputs per unit, a divisor of TILE
    slots: int  # weights per code word
    units: int  # units per block

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

    def words(self, columns: int) -> int:
        """Int64 words per token."""
        return self.blocks(columns) * self.quads * self.units


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
    p_out,  # [T, blocks, QUADS, UNITS, 4], float16 if SCALE, else like x
    p_scale,  # float32 [T, blocks UNITS], written if SCALE
    columns,  # K
    blocks,
    BLOCK: tl.constexpr,  # of the rotation
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    QUADS: tl.constexpr,
    UNITS: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
    TILE: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # a product, which waits: see `half2.wait_for_inputs`
    token = tl.program_id(0).to(tl.int64)
    o_input = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(p_x + token * columns + o_input, mask=o_input < columns, other=0.0).to(tl.float32)
    if BLOCK > 1:
        x = _rotate(x * tl.load(p_signs + tl.arange(0, TILE) % BLOCK), TILE, BLOCK)

    unit = tl.reshape(x, [TILE // UNIT, UNIT])
    o_unit = tl.program_id(1) * (TILE // UNIT) + tl.arange(0, TILE // UNIT)
    exists = o_unit < blocks * UNITS
    if SCALE:
        # The biased exponent of the largest magnitude, as stored in a float32.
        exponent = tl.maximum(tl.max(tl.abs(unit), 1).to(tl.int32, bitcast=True) >> 23, 14)
        unit = unit * ((267 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        p_scale += token * blocks * UNITS + o_unit
        tl.store(p_scale, ((exponent - 13) << 23).to(tl.float32, bitcast=True), mask=exists)

    o_unit, exists = o_unit[:, None], exists[:, None]
    p_out += token * blocks * (QUADS * UNITS * 4)
    o_place = _place(o_unit, tl.arange(0, UNIT)[None, :], SLOTS, QUADS, UNITS)
    tl.store(p_out + o_place, unit, mask=exists)
    if PLACES > UNIT:
        o_rest = UNIT + tl.arange(0, 8)[None, :]
        o_place = _place(o_unit, o_rest, SLOTS, QUADS, UNITS)
        tl.store(p_out + o_place, tl.zeros([TILE // UNIT, 8], tl.float32), mask=exists & (o_rest < PLACES))


@triton.jit
def _place(unit, r, SLOTS: tl.constexpr, QUADS: tl.constexpr, UNITS: tl.constexpr):
    """The offset at which input `r` of a unit is stored."""
    word, slot = r // SLOTS, r % SLOTS
    pair = word // 2 * SLOTS + slot
    quad = (unit // UNITS * QUADS + pair // 2) * UNITS + unit % UNITS
    return quad * 4 + pair % 2 * 2 + word % 2
