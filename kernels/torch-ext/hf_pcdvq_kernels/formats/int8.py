"""Eight bits. The format is documented in `hf_pcdvq/codecs/scalar.py`. It has no Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Argument, Decode, PackedWeight, Specs

BYTES = 4  # weights per word


@dataclass(frozen=True)
class Int8Weight(PackedWeight):
    """Signed bytes with a scale per output channel.

    Args:
        weight: int32 `[N, K/4]`, four weights per word.
        scale: float32 `[N]`.
    """

    scale: Tensor

    family = "int8"
    names = ("int8",)
    arguments = (Argument("weight", "Tensor", stacked=True), Argument("scale", "Tensor", stacked=True))
    on_cpu = True

    @property
    def name(self) -> str:
        return "int8"

    @classmethod
    def multiple(cls, name: str) -> int:
        return BYTES

    @classmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        return {"weight": ((rows, columns // BYTES), torch.int32), "scale": ((rows,), torch.float32)}

    @classmethod
    def random_scales(cls, name: str) -> dict[str, float]:
        return {"scale": 1 / 64}

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        from ..reference import int8

        return lambda start, stop: int8.dequantize(self.weight[start:stop], self.scale[start:stop], dtype)

    def reference_matmul(self, x: Tensor, transposed: bool) -> Tensor:
        from ..reference import int8

        return int8.matmul(x, self.weight, self.scale, transposed)
