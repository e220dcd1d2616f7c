"""Constants of the packed formats that encoder and decoders share.

The formats are described in words, with their decode formulas, in the codecs that write them:
`hf_pcdvq/codecs/polar.py`, `convolutional.py` and `stream.py`. This file holds only the numbers, here because the
decoders may not import the plugin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

import torch

VECTOR = 8  # PCDVQ: consecutive inputs of one output channel that share a direction and a magnitude
SIGN_BITS = 7  # PCDVQ: the eighth sign is the parity of the other seven
MAGNITUDE_BITS = 2  # PCDVQ: four magnitude levels
GROUP = 64  # CCQ: consecutive inputs of one output channel that share a group scale
STREAM_RING = 256  # CCQ stream: output channels whose bits, for one input, form a ring
STREAM_MULTIPLIER = 0x8A7050F1  # CCQ stream: of the hash, the winner of `tools/search_stream_hash.py`


@dataclass(frozen=True)
class CcqLayout:
    """How one published CCQ layout cuts a code word into overlapping windows.

    Weight `i` of a group of 64 lies in code word `i // len(shifts)`, as the `window_bits` bits above
    `shifts[i % len(shifts)]`; its integer value is that window minus `offset`.
    """

    name: str
    bits: float  # nominal bits per weight
    storage: torch.dtype  # dtype of one stored word, whose bit pattern is what counts
    words: int  # stored words per group of 64 weights
    shifts: tuple[int, ...]
    window_bits: int
    scale_bits: int  # group-scale bits in the low end of the last word; 0: scales lie in a tensor of their own

    @property
    def offset(self) -> int:
        return 1 << (self.window_bits - 1)

    @property
    def clustered(self) -> bool:
        """True where a stored byte is mapped linearly to the code word ("code cluster")."""
        return self.scale_bits == 0

    @property
    def code_bits(self) -> int:
        """Length of a code word: the windows laid over each other."""
        return self.shifts[0] + self.window_bits

    @property
    def max_scale(self) -> int:
        """Largest integer group scale."""
        return 15 if self.clustered else (1 << self.scale_bits) - 1


CCQ_LAYOUTS: dict[str, CcqLayout] = {
    layout.name: layout
    for layout in (
        CcqLayout("2.75", 2.75, torch.uint8, 22, (4, 2, 0), window_bits=4, scale_bits=4),
        CcqLayout("2.5", 2.5, torch.int16, 10, (13, 11, 9, 6, 4, 2, 0), window_bits=3, scale_bits=13),
        CcqLayout("2.0625", 2.0625, torch.uint8, 16, (9, 6, 3, 0), window_bits=6, scale_bits=0),
    )
}


@dataclass(frozen=True)
class StreamLayout:
    """How the CCQ `stream` layout lays its windows over a ring of bits.

    Output channels are coded in turn, each with the next of the `strides` new bits. A `period` is the least number of
    channels after which the strides and the borders of the 32-bit words repeat.
    """

    bits: float  # bits per weight, the mean of the strides
    window: int  # bits per window
    strides: tuple[int, ...]

    @property
    def period(self) -> int:
        """Output channels per period."""
        return math.lcm(sum(self.strides), 32) // sum(self.strides) * len(self.strides)

    @property
    def period_words(self) -> int:
        """Words that a period takes."""
        return math.lcm(sum(self.strides), 32) // 32

    @property
    def ends(self) -> tuple[int, ...]:
        """For every channel of a period the bit position behind its window."""
        return tuple(accumulate(islice(cycle(self.strides), self.period)))

    def words(self, rows: int) -> int:
        """Words per input for a number of output channels, which is filled up to whole periods."""
        return -(-rows // self.period) * self.period_words


_STREAM_STRIDES = {2.0: (2,), 2.25: (2, 2, 2, 3), 2.5: (2, 3), 3.0: (3,), 4.0: (4,)}
STREAM_BITS = tuple(_STREAM_STRIDES)
STREAM_WINDOWS = (12, 13, 14, 15, 16)

# Every format by the name that `prepare` takes: method and bits per weight.
CODECS = (
    "pcdvq 2.0",
    "pcdvq 2.25",
    *(f"ccq {name}" for name in CCQ_LAYOUTS),
    *(f"stream {bits}" for bits in STREAM_BITS),
)


def stream_layout(bits: float, window: int) -> StreamLayout:
    """The stream layout of these parameters.

    Raises:
        ValueError: there is none.
    """
    if bits not in STREAM_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, STREAM_BITS))}, got {bits!r}")
    if window not in STREAM_WINDOWS:
        raise ValueError(f"window must be one of {', '.join(map(str, STREAM_WINDOWS))}, got {window!r}")
    return StreamLayout(bits, window, _STREAM_STRIDES[bits])
