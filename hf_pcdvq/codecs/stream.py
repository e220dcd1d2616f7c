"""CCQ's `stream` layout: the bit-shift windows of CCQ over long tail-biting rings of bits, with a hashed value.

The published layouts (`convolutional.py`) read small integers from short words, and cannot get below the distortion
of a scalar quantizer. Here windows of `L` = 12 to 16 bits slide along a ring of up to 256 weights, every weight adds
2 to 4 new bits, and its value is a hash of the whole window, close to normal over all windows: a trellis-coded
quantizer (as in QTIP, arXiv 2406.11235) that decodes with shift, mask, multiply and a sum of bytes, without
a table.

A ring runs along the output channels: it holds the weights of one input for 256 consecutive output channels, or for
those that remain in the last ring. Every input is then a unit of its own for error feedback, which is worth more than
any other arrangement, and a kernel that keeps 16 or more channels per thread needs each activation only once.

Packed tensors of a weight `[N, K]`, N padded to a multiple of the period P; a shard by inputs, or by output channels
at multiples of 256, is a slice:

    weight (suffix "")                 int32 [ceil(N / P) W, K]
    "scale"                            float32 [N]

    bits    new bits of channel 0, 1, ...    P      W (words per period)
    2.0     2                                16     1
    2.25    2, 2, 2, 3, repeating            128    9
    2.5     2, 3, repeating                  64     5
    3.0     3                                32     3
    4.0     4                                8      1

The words of one input and one ring, each from its highest bit to its lowest, are the ring's bits. The window of a
channel is the `L` bits that end with its own new bits; the ring's first bit follows its last. All integers mod 2^32:

    product = window * 0x8A7050F1
    value   = sum of the four bytes of the product, each as a signed integer -128..127
    weight  = scale[n] * value                                                            (float32)

Values are in -512..508 with a standard deviation near 150, which `scale` takes into account: they are exact in
float16, and no step can overflow. The channels that pad the last period are not decoded.

Encoding finds, for fixed scales, rings with nearly the least squared error by a Viterbi search (`viterbi/`). The
search favors the channels of a ring where errors matter most, those with a large scale, at the expense of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from hf_pcdvq_kernels.formats.stream import (
    STREAM_BITS,
    STREAM_RING,
    STREAM_WINDOW_BITS,
    StreamLayout,
    StreamWeight,
    stream_layout,
)
from hf_pcdvq_kernels.reference.stream import values
from torch import Tensor
from torch.nn.functional import pad

from . import viterbi
from .base import Codec, Packed, UnitEncoder, one_of, row_scale

# Standard deviation of a sum of four bytes.
DEVIATION = (4 * (2**16 - 1) / 12) ** 0.5
# Factors on a row's root mean square that minimize the squared error on normal weights.
_SHRINK = {2.0: 0.97, 2.25: 0.99, 2.5: 1.0, 3.0: 1.01, 4.0: 1.03}


@dataclass(frozen=True)
class StreamCodec(Codec):
    """CCQ in the `stream` layout.

    Attributes:
        stream_bits: 2.0, 2.25, 2.5, 3.0 or 4.0 bits per weight.
        window_bits: 12 to 16; larger windows have a smaller error and take longer to encode.
    """

    stream_bits: float
    window_bits: int

    family = StreamWeight
    method = "ccq"

    @classmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        return {f"stream-{bits}": {"layout": "stream", "bits": bits} for bits in STREAM_BITS}

    @classmethod
    def of(
        cls, max_block: int, seed: int, layout: str, bits: float | None = None, window_bits: int | None = None
    ) -> Self:
        bits, window_bits = (2.0 if bits is None else bits), (12 if window_bits is None else window_bits)
        one_of("bits", bits, STREAM_BITS)
        one_of("window_bits", window_bits, STREAM_WINDOW_BITS)
        return cls(max_block, seed, float(stream_layout(bits, window_bits).bits), int(window_bits))

    def __post_init__(self) -> None:
        stream_layout(self.stream_bits, self.window_bits)

    @property
    def layout(self) -> StreamLayout:
        return stream_layout(self.stream_bits, self.window_bits)

    @property
    def bits(self) -> float:
        return self.stream_bits

    @property
    def multiple(self) -> int:
        # The code itself supports any number of inputs, but smaller rotation blocks have next to no effect.
        return 8 if self.max_block else 1

    @property
    def format(self) -> str:
        return f"stream-{self.stream_bits}"

    def details(self) -> list[str]:
        return [f"windows of {self.window_bits} bits", *super().details()]

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.stream_bits, "window_bits": self.window_bits}

    def encode_rotated(self, weight: Tensor) -> Packed:
        encoder = self.unit_encoder(weight)
        windows = encoder.search(weight.T).T
        # Rows that are small compared to others in their ring get codes that barely follow them; a smaller scale
        # compensates for that.
        found = encoder.values[windows]
        wanted = weight / torch.where(encoder.scale > 0, encoder.scale, 1)[:, None]
        encoder.rescale((wanted * found).sum(1).clamp(min=0) / found.square().sum(1).clamp(min=1))
        return encoder.pack(windows)

    def unit_encoder(self, weight: Tensor) -> StreamEncoder:
        return StreamEncoder(self.layout, weight)


class StreamEncoder(UnitEncoder):
    """Encodes one input, with all its rings, at a time. The code of a weight is its window; only new bits are stored.

    Attributes:
        scale: scales of the output channels, float32 `[N]`.
        values: values of all windows, float32 `[2^L]`.
    """

    def __init__(self, layout: StreamLayout, weight: Tensor):
        self.layout, self.rows = layout, len(weight)
        self.values = values(layout.window_bits, weight.device).float()
        self.units = [slice(column, column + 1) for column in range(weight.shape[1])]
        self._unit_values = self.values / DEVIATION
        self._importance: Tensor | None = None
        self._set_scale(row_scale(weight) * (_SHRINK[layout.bits] / DEVIATION))

    def _set_scale(self, scale: Tensor) -> None:
        """Set the scales, and what a search derives from them."""
        self.scale = scale
        # In units of the standard deviation, so that float32 sums over a ring keep all significant digits. Errors
        # cost nothing in the padding of the last period and in channels of zeros, elsewhere in proportion to the
        # scale squared.
        self._divisor = torch.where(scale > 0, scale, 1) * DEVIATION
        cost = (scale / scale.amax().clamp(min=torch.finfo(torch.float32).tiny)).square()
        if self._importance is not None:
            cost = cost * self._importance
        self._filled = -self.rows % self.layout.period
        self._cost = pad(cost, (0, self._filled))

    def search(self, columns: Tensor) -> Tensor:
        """Windows int32 `[C, N]` with nearly the least squared error for float32 `columns` `[C, N]` of `C` inputs."""
        targets = pad(columns / self._divisor, (0, self._filled))
        return viterbi.search(targets, self._cost, self._unit_values, self.layout)[:, : self.rows]

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.search(target.T)[0]
        return windows, (self.scale * self.values[windows])[:, None]

    def improved(self, change: Tensor) -> Tensor:
        rings = pad(change, (0, -self.rows % STREAM_RING)).view(-1, STREAM_RING).sum(1)
        return (rings < 0).repeat_interleave(STREAM_RING)[: self.rows]

    def weigh(self, importance: Tensor) -> None:
        self._importance = importance / importance.amax()
        self._set_scale(self.scale)

    def rescale(self, factor: Tensor) -> None:
        self._set_scale(self.scale * factor)

    def pack(self, codes: Tensor) -> Packed:
        layout = self.layout
        rows = pad(codes, (0, 0, 0, -self.rows % layout.period)).view(-1, layout.period, codes.shape[1])
        words = codes.new_zeros(len(rows), layout.period_words, codes.shape[1])
        start = 0
        for row, end in enumerate(layout.ends):
            for position in range(start, end):
                bit = rows[:, row] >> (end - 1 - position) & 1
                words[:, position // 32] |= bit << (31 - position % 32)
            start = end
        # If the last ring ends in padding, its last bits must be those that its first window begins with.
        words[-1, -1] |= codes[(self.rows - 1) // STREAM_RING * STREAM_RING] >> layout.strides[0]
        return {"": words.flatten(0, 1), "scale": self.scale}
