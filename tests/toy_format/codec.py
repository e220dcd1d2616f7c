"""The toy format: see `hf_pcdvq_kernels/formats/toy.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hf_pcdvq_kernels.formats.toy import ToyWeight
from torch import Tensor

from .base import Codec, Packed, UnitEncoder


@dataclass(frozen=True)
class ToyCodec(Codec):
    family = ToyWeight
    method = "ccq"

    @classmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        return {"toy-4.0": {"layout": "toy"}}

    @classmethod
    def of(cls, max_block, seed, layout, bits=None, window_bits=None):
        return cls(max_block, seed)

    @property
    def format(self) -> str:
        return "toy-4.0"

    @property
    def bits(self) -> float:
        return 4.0

    def encode_rotated(self, weight: Tensor) -> Packed:
        encoder = self.unit_encoder(weight)
        return encoder.pack(encoder.nearest(weight))

    def unit_encoder(self, weight: Tensor) -> UnitEncoder:
        return ToyEncoder(weight)


class ToyEncoder(UnitEncoder):
    def __init__(self, weight: Tensor):
        self.rows, self.scale = len(weight), weight.abs().amax(1) / 7
        self.units = [slice(column, column + 1) for column in range(weight.shape[1])]

    def nearest(self, target: Tensor) -> Tensor:
        codes = (target / torch.where(self.scale > 0, self.scale, 1)[:, None]).round().clamp(-8, 7)
        return codes.to(torch.int32)

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.nearest(target)
        return codes[:, 0], codes * self.scale[:, None]

    def rescale(self, factor: Tensor) -> None:
        self.scale = self.scale * factor

    def pack(self, codes: Tensor) -> Packed:
        low, high = ((codes + 8).to(torch.uint8)[:, start::2] for start in (0, 1))
        return {"": low | high << 4, "scale": self.scale}
