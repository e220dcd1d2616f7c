"""PCDVQ: polar coordinate decoupled vector quantization (arXiv 2506.05432, sections 3.2 and 3.3).

A rotated row (see `hadamard.py`) is divided by its root mean square and split into 8-vectors; the direction and the
magnitude of a vector are quantized separately. A direction is one of 128 or 512 non-negative patterns with an even
number of signs flipped, which gives the paper's 2^14 or 2^16 directions from a table of 1 or 4 KiB.

Packed tensors of a weight `[N, K]`:

    setting   weight (suffix "")   "magnitude"          "scale"       K a multiple of
    2.0       uint8 [N, K/4]       -                    float32 [N]   8
    2.25      uint8 [N, K/4]       uint8 [N, K/32]      float32 [N]   32

Bytes 2v and 2v+1 of a row are the 16-bit word of vector v, the low byte first. Its bits, from the lowest:

    2.0       bits 0-6 signs   bits 7-13 pattern (128)   bits 14-15 magnitude
    2.25      bits 0-6 signs   bits 7-15 pattern (512)   magnitude of vector v: bits 2(v%4), 2(v%4)+1 of byte v//4

Decoding, in float32: coordinate j of a vector in row n is

    (scale[n] * levels[magnitude]) * (-1)^(bit j of signs) * patterns[pattern, j]

where bit 7 of the signs is the parity of bits 0-6. `patterns` (int8, norm about 127) and `levels` (already divided by
127) come from the codebook that the config names (see `codebook.py`).

The magnitude is either the paper's `"norm"` |v|, or the `"projection"` <v, d> onto the chosen direction, which is the
least-squares choice and reduces the squared error by 2 %, but not the perplexity of a calibrated model
(docs/quality.md). They differ in encoding and in `levels`, not in layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from hf_pcdvq_kernels.formats.base import bytes_from_words
from hf_pcdvq_kernels.formats.pcdvq import MAGNITUDE_BITS, SIGN_BITS, VECTOR, PcdvqWeight
from hf_pcdvq_kernels.reference.pcdvq import sign_table
from torch import Tensor

from .base import Codec, Packed, UnitEncoder, one_of, row_scale
from .codebook import load_codebook
from .directions import nearest_direction

CODEBOOKS = {2.0: "pcdvq-a14-v1", 2.25: "pcdvq-a16-v1"}


@dataclass(frozen=True)
class PolarCodec(Codec):
    """PCDVQ at 2.0 or 2.25 bits.

    Attributes:
        codebook: id of the shipped codebook, which determines the number of patterns and hence the bits.
        magnitude: `"norm"` or `"projection"`.
    """

    codebook: str
    magnitude: str

    family = PcdvqWeight
    method = "pcdvq"

    @classmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        return {f"pcdvq-{bits}": {"bits": bits} for bits in CODEBOOKS}

    @classmethod
    def of(
        cls, max_block: int, seed: int, bits: float = 2.25, magnitude: str = "norm", codebook: str | None = None
    ) -> Self:
        one_of("bits", bits, tuple(CODEBOOKS))
        one_of("magnitude", magnitude, ("norm", "projection"))
        if codebook is not None and not isinstance(codebook, str):
            raise ValueError(f"codebook must be the name of a codebook, got {codebook!r}")
        made = cls(max_block, seed, CODEBOOKS[bits] if codebook is None else codebook, magnitude)
        if made.bits != bits:
            raise ValueError(f"codebook {codebook!r} is for {made.bits} bits, but bits is {bits}")
        return made

    @property
    def _split(self) -> bool:
        """Whether magnitudes are stored in a separate tensor."""
        return self.bits > 2

    @property
    def format(self) -> str:
        return f"pcdvq-{self.bits}"

    def details(self) -> list[str]:
        return [f"magnitude {self.magnitude}"]

    @property
    def bits(self) -> float:
        return (SIGN_BITS + len(self.patterns).bit_length() - 1 + MAGNITUDE_BITS) / VECTOR

    @property
    def patterns(self) -> Tensor:
        return load_codebook(self.codebook)["patterns"]

    @property
    def levels(self) -> Tensor:
        return load_codebook(self.codebook)[f"levels_{self.magnitude}"]

    def code_tables(self) -> Packed:
        return {"patterns": self.patterns.clone(), "levels": self.levels.clone()}

    def encode_rotated(self, weight: Tensor) -> Packed:
        encoder = self.unit_encoder(weight)
        return self.pack(*encoder.nearest(unit_rows(weight, encoder.scale).reshape(-1, VECTOR)), encoder.scale)

    def unit_encoder(self, weight: Tensor) -> PolarEncoder:
        return PolarEncoder(self, weight)

    def pack(self, index: Tensor, signs: Tensor, level: Tensor, scale: Tensor) -> Packed:
        """Pack pattern indices, signs and levels, int32 `[N * K/8]` each."""
        rows = scale.shape[0]
        words = signs | index << SIGN_BITS
        packed = {}
        if self._split:
            shifts = torch.arange(0, 4 * MAGNITUDE_BITS, MAGNITUDE_BITS, device=level.device, dtype=torch.int32)
            packed["magnitude"] = (level.reshape(rows, -1, 4) << shifts).sum(-1).to(torch.uint8)
        else:
            words = words | level << (16 - MAGNITUDE_BITS)
        packed[""] = bytes_from_words(words.reshape(rows, -1))
        packed["scale"] = scale
        return packed


class PolarEncoder(UnitEncoder):
    """Encodes 8-vectors of rows with fixed scales. A code is `signs | pattern << 7 | level << 16`."""

    def __init__(self, codec: PolarCodec, weight: Tensor):
        self.rows, self.scale = len(weight), row_scale(weight)
        self.units = [slice(start, start + VECTOR) for start in range(0, weight.shape[1], VECTOR)]
        self._codec = codec
        self._patterns = codec.patterns.to(weight.device).float()
        self._levels = codec.levels.to(weight.device)
        self._directions = self._patterns / self._patterns.norm(dim=1, keepdim=True)
        self._signs = sign_table(weight.device)

    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pattern, sign bits 0-6 and magnitude level, int32 `[n]` each, of float32 vectors `[n, 8]` of unit scale."""
        index, signs, projection = nearest_direction(vectors, self._directions)
        magnitude = projection if self._codec.magnitude == "projection" else vectors.norm(dim=1)
        return index, signs, nearest_level(magnitude, 127 * self._levels)

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        index, signs, level = self.nearest(unit_rows(target, self.scale))
        values = self._patterns.index_select(0, index) * self._signs.index_select(0, signs)
        return signs | index << SIGN_BITS | level << 16, (self.scale * self._levels[level])[:, None] * values

    def rescale(self, factor: Tensor) -> None:
        self.scale = self.scale * factor

    def pack(self, codes: Tensor) -> Packed:
        flat = codes.flatten()
        words = flat & 0xFFFF
        return self._codec.pack(words >> SIGN_BITS, words & ((1 << SIGN_BITS) - 1), flat >> 16, self.scale)


def unit_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Rows of a float32 weight `[N, K]` divided by their scale `[N]`; rows with scale 0 are left unchanged."""
    return weight / torch.where(scale > 0, scale, 1.0)[:, None]


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of the ascending `levels`, int32, with the shape of `values`."""
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values, borders, out_int32=True)
