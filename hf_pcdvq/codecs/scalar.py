"""Eight bits: every rotated weight rounded to an integer times a scale of its row.

For the parts of a mixed recipe that two bits would hurt most and that are few: attention, shared experts, dense layers.

Packed tensors of a weight `[N, K]`:

    weight (suffix "")     "scale"       K a multiple of
    int32 [N, K/4]         float32 [N]   8

A word holds four weights, the first in its lowest byte, each a signed byte from -127 to 127. (Words and not bytes: a
packed tensor's shape must differ from the dense one's.) Decoding, in float32: `byte * scale[n]`.

On normal weights the squared error is 0.0001 of their energy: a hundredth of that of good 4-bit codes, and far below
what bfloat16 activations cost. So one scale per row will do, and there is nothing that groups could improve.
"""

from __future__ import annotations

from dataclasses import dataclass

import hf_pcdvq_kernels as ops
import torch
from torch import Tensor
from torch.nn import functional

from .base import Codec, Packed, Specs, UnitEncoder

LIMIT = 127
_PER_WORD = 4


@dataclass(frozen=True)
class ScalarCodec(Codec):
    """Signed bytes with a scale per row."""

    @property
    def bits(self) -> float:
        return 8.0

    @property
    def multiple(self) -> int:
        return 8  # smaller blocks of the rotation do next to nothing

    def specs(self, out_features: int, in_features: int) -> Specs:
        return {
            "": ((out_features, in_features // _PER_WORD), torch.int32),
            "scale": ((out_features,), torch.float32),
        }

    def encode_rotated(self, weight: Tensor) -> Packed:
        encoder = self.unit_encoder(weight)
        return encoder.pack(encoder.nearest(weight, encoder.scale[:, None]))

    def unit_encoder(self, weight: Tensor) -> ScalarEncoder:
        return ScalarEncoder(weight)

    def decode_rotated(self, packed: Packed, tables: Packed, dtype: torch.dtype) -> Tensor:
        return (packed[""].view(torch.int8).float() * packed["scale"][:, None]).to(dtype)

    def matmul(self, x: Tensor, packed: Packed, tables: Packed, prepared: Tensor | None = None) -> Tensor:
        # Bytes are exact in every floating dtype, so that only the result needs scaling, which is done in float32.
        if "signs" in tables:
            x = ops.hadamard(x, tables["signs"])
        out = functional.linear(x, packed[""].view(torch.int8).to(x.dtype))
        return (out.float() * packed["scale"]).to(x.dtype)


class ScalarEncoder(UnitEncoder):
    """Encodes one input at a time. The code of a weight is its integer."""

    def __init__(self, weight: Tensor):
        self.rows = len(weight)
        self.scale = weight.abs().amax(1) / LIMIT
        self.units = [slice(column, column + 1) for column in range(weight.shape[1])]

    @staticmethod
    def nearest(target: Tensor, scale: Tensor) -> Tensor:
        """Integers int32 of the shape of `target`."""
        return (target / torch.where(scale > 0, scale, 1)).round().clamp(-LIMIT, LIMIT).to(torch.int32)

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.nearest(target, self.scale[:, None])
        return codes[:, 0], codes * self.scale[:, None]

    def rescale(self, factor: Tensor) -> None:
        self.scale = self.scale * factor

    def pack(self, codes: Tensor) -> Packed:
        return {"": codes.to(torch.int8).contiguous().view(torch.int32), "scale": self.scale}
