"""Eight bits: every rotated weight is rounded to an integer times the scale of its row.

For the small parts of a mixed recipe that two bits would hurt most: attention, shared experts, dense layers. And for token
embeddings and output heads, whose rows are decoded one by one. They are rotated like all others: on SmolLM2's the squared error
is 0.000057 of the energy with the rotation and 0.000137 without, and CPU kernels round the inputs of a head to integers, too.

Packed tensors of a weight `[N, K]`:

    weight (suffix "")     "scale"       K a multiple of
    int32 [N, K/4]         float32 [N]   8

A word holds four weights, the first in its lowest byte, each a signed byte from -127 to 127. (Words rather than
bytes: a packed tensor's shape must differ from that of the dense tensor.) Decoding, in float32: `byte * scale[n]`.

On normal weights the squared error is 0.0001 of their energy: a hundredth of that of good 4-bit codes, and far below
the error of bfloat16 activations. So one scale per row suffices; group scales could not improve on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from hf_pcdvq_kernels.formats.int8 import Int8Weight
from torch import Tensor

from .base import Codec, Packed, UnitEncoder

LIMIT = 127


@dataclass(frozen=True)
class ScalarCodec(Codec):
    """Signed bytes with one scale per row."""

    family = Int8Weight
    method = None

    @classmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        return {"int8": {}}

    @classmethod
    def of(cls, max_block: int, seed: int) -> Self:
        return cls(max_block, seed)

    @property
    def format(self) -> str:
        return "int8"

    @property
    def bits(self) -> float:
        return 8.0

    @property
    def multiple(self) -> int:
        return 8  # smaller rotation blocks have next to no effect

    def encode_rotated(self, weight: Tensor) -> Packed:
        encoder = self.unit_encoder(weight)
        return encoder.pack(encoder.nearest(weight, encoder.scale[:, None]))

    def unit_encoder(self, weight: Tensor) -> ScalarEncoder:
        return ScalarEncoder(weight)


class ScalarEncoder(UnitEncoder):
    """Encodes one input at a time. The code of a weight is its integer."""

    def __init__(self, weight: Tensor):
        self.rows = len(weight)
        self.scale = weight.abs().amax(1) / LIMIT
        self.units = [slice(column, column + 1) for column in range(weight.shape[1])]

    @staticmethod
    def nearest(target: Tensor, scale: Tensor) -> Tensor:
        """The nearest integers, int32 with the shape of `target`."""
        return (target / torch.where(scale > 0, scale, 1)).round().clamp(-LIMIT, LIMIT).to(torch.int32)

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.nearest(target, self.scale[:, None])
        return codes[:, 0], codes * self.scale[:, None]

    def rescale(self, factor: Tensor) -> None:
        self.scale = self.scale * factor

    def pack(self, codes: Tensor) -> Packed:
        return {"": codes.to(torch.int8).contiguous().view(torch.int32), "scale": self.scale}
