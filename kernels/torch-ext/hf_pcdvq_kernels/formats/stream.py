"""CCQ's `stream` layout. The format is documented, with its decode formula, in `hf_pcdvq/codecs/stream.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Argument, Decode, PackedWeight, Specs

if TYPE_CHECKING:
    from ..triton.format_kernels import FormatKernels

STREAM_RING = 256  # output channels whose bits, for one input, form a tail-biting ring
STREAM_MULTIPLIER = 0x8A7050F1  # of the hash, found by `tools/search_stream_hash.py`
_STRIDES = {2.0: (2,), 2.25: (2, 2, 2, 3), 2.5: (2, 3), 3.0: (3,), 4.0: (4,)}
STREAM_BITS = tuple(_STRIDES)
STREAM_WINDOW_BITS = (12, 13, 14, 15, 16)


@dataclass(frozen=True)
class StreamLayout:
    """How the `stream` layout places its windows on a ring of bits.

    Output channels are coded in order, each adding as many new bits as the next of the `strides`. A `period` is the
    smallest number of channels after which the strides and the boundaries of the 32-bit words repeat.
    """

    bits: float  # bits per weight, the mean of the strides
    window_bits: int
    strides: tuple[int, ...]

    @property
    def period(self) -> int:
        """Output channels per period."""
        return math.lcm(sum(self.strides), 32) // sum(self.strides) * len(self.strides)

    @property
    def period_words(self) -> int:
        """Words per period."""
        return math.lcm(sum(self.strides), 32) // 32

    @property
    def ends(self) -> tuple[int, ...]:
        """For every channel of a period, the bit position after its window."""
        return tuple(accumulate(islice(cycle(self.strides), self.period)))

    def words(self, rows: int) -> int:
        """Words per input for `rows` output channels, padded to whole periods."""
        return -(-rows // self.period) * self.period_words


@cache
def stream_layout(bits: float, window_bits: int) -> StreamLayout:
    """The stream layout with these parameters.

    Raises:
        ValueError: unsupported `bits` or `window_bits`.
    """
    if bits not in STREAM_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, STREAM_BITS))}, got {bits!r}")
    if window_bits not in STREAM_WINDOW_BITS:
        allowed = ", ".join(map(str, STREAM_WINDOW_BITS))
        raise ValueError(f"window_bits must be one of {allowed}, got {window_bits!r}")
    return StreamLayout(bits, window_bits, _STRIDES[bits])


@dataclass(frozen=True)
class StreamWeight(PackedWeight):
    """CCQ in the `stream` layout.

    Args:
        weight: int32 `[words, K]`, for every input the bits of all output channels.
        scale: float32 `[N]`, per output channel.
        bits: 2.0, 2.25, 2.5, 3.0 or 4.0 bits per weight.
        window_bits: 12 to 16.
    """

    scale: Tensor
    bits: float
    window_bits: int

    family = "stream"
    names = tuple(f"stream-{bits}" for bits in STREAM_BITS)
    arguments = (
        Argument("weight", "Tensor", stacked=True),
        Argument("scale", "Tensor", stacked=True),
        Argument("bits", "float"),
        Argument("window_bits", "int"),
    )
    has_kernels = True
    on_cpu = True
    row_multiple = STREAM_RING

    @cached_property
    def layout(self) -> StreamLayout:
        return stream_layout(self.bits, self.window_bits)

    @cached_property
    def name(self) -> str:
        return f"stream-{self.layout.bits}"

    @property
    def rows(self) -> int:
        return self.scale.shape[0]

    @classmethod
    def multiple(cls, name: str) -> int:
        return 1

    @classmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        words = stream_layout(**cls.parameters(name)).words(rows)
        return {"weight": ((words, columns), torch.int32), "scale": ((rows,), torch.float32)}

    @classmethod
    def parameters(cls, name: str) -> dict[str, Any]:
        return {"bits": float(name.removeprefix("stream-")), "window_bits": STREAM_WINDOW_BITS[0]}

    @classmethod
    def random_scales(cls, name: str) -> dict[str, float]:
        return {"scale": 1 / 148}

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        from ..reference import stream

        layout = self.layout
        table = stream.values(layout.window_bits, self.weight.device).float()

        def decode(start: int, stop: int) -> Tensor:
            first = start // layout.period * layout.period_words
            words = self.weight[first : first + layout.words(stop - start)]
            return stream.dequantize(words, self.scale[start:stop], table, layout, dtype)

        return decode

    @classmethod
    def kernels(cls) -> FormatKernels:
        from ..triton.stream import StreamKernels

        return StreamKernels()
