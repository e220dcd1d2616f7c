"""The toy format: four bits, rounded to integers times a scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Argument, Decode, PackedWeight, Specs


@dataclass(frozen=True)
class ToyWeight(PackedWeight):
    """Args: weight: uint8 `[N, K/2]`, the first of two weights in the low bits, plus 8. scale: float32 `[N]`."""

    scale: Tensor

    family = "toy"
    names = ("toy-4.0",)
    arguments = (Argument("weight", "Tensor", stacked=True), Argument("scale", "Tensor", stacked=True))
    has_kernels = True

    @property
    def name(self) -> str:
        return "toy-4.0"

    @classmethod
    def multiple(cls, name: str) -> int:
        return 32

    @classmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        return {"weight": ((rows, columns // 2), torch.uint8), "scale": ((rows,), torch.float32)}

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        from ..reference import toy

        return lambda start, stop: toy.dequantize(self.weight[start:stop], self.scale[start:stop], dtype)

    @classmethod
    def kernels(cls):
        from ..triton.toy import ToyKernels

        return ToyKernels()
