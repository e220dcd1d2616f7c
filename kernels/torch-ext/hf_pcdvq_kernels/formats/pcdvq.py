"""PCDVQ. The format is documented, with its decode formula, in `hf_pcdvq/codecs/polar.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Argument, Decode, PackedWeight, Specs, words_from_bytes

if TYPE_CHECKING:
    from ..triton.format_kernels import FormatKernels

VECTOR = 8  # consecutive inputs of one output channel that share a direction and a magnitude
SIGN_BITS = 7  # the eighth sign is the parity of the other seven
MAGNITUDE_BITS = 2  # four magnitude levels


@dataclass(frozen=True)
class PcdvqWeight(PackedWeight):
    """PCDVQ at 2.0 or 2.25 bits (arXiv 2506.05432, section 3).

    Args:
        weight: uint8 `[N, K/4]`, one 16-bit word, the low byte first, per 8-vector.
        magnitude: uint8 `[N, K/32]`, 2-bit magnitudes of four vectors per byte; None for 2.0, whose words hold them.
        scale: float32 `[N]`, standard deviation of each rotated row.
        patterns: int8 `[512, 8]` with `magnitude`, `[128, 8]` without; non-negative, of norm about 127.
        levels: float32 `[4]`, magnitudes divided by 127, in units of the row's standard deviation.
    """

    magnitude: Tensor | None
    scale: Tensor
    patterns: Tensor
    levels: Tensor

    family = "pcdvq"
    names = ("pcdvq-2.0", "pcdvq-2.25")
    arguments = (
        Argument("weight", "Tensor", stacked=True),
        Argument("magnitude", "Tensor?", stacked=True),
        Argument("scale", "Tensor", stacked=True),
        Argument("patterns", "Tensor"),
        Argument("levels", "Tensor"),
    )
    has_kernels = True
    on_cpu = True

    @property
    def name(self) -> str:
        return "pcdvq-2.0" if self.magnitude is None else "pcdvq-2.25"

    @cached_property
    def words(self) -> Tensor:
        """The words of the weight, int16 `[N, K/8]`."""
        return words_from_bytes(self.weight)

    @classmethod
    def multiple(cls, name: str) -> int:
        return 4 * VECTOR if name == "pcdvq-2.25" else VECTOR

    @classmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        specs: Specs = {"weight": ((rows, 2 * columns // VECTOR), torch.uint8)}
        if name == "pcdvq-2.25":
            specs["magnitude"] = ((rows, columns // (4 * VECTOR)), torch.uint8)
        specs["scale"] = ((rows,), torch.float32)
        return specs

    @classmethod
    def table_specs(cls, name: str) -> Specs:
        pattern_bits = 16 - SIGN_BITS - (0 if name == "pcdvq-2.25" else MAGNITUDE_BITS)
        return {
            "patterns": ((1 << pattern_bits, VECTOR), torch.int8),
            "levels": ((1 << MAGNITUDE_BITS,), torch.float32),
        }

    @classmethod
    def random_tables(cls, name: str, generator: torch.Generator) -> dict[str, Tensor]:
        shape, _ = cls.table_specs(name)["patterns"]
        on = {"generator": generator, "device": generator.device}
        levels = (torch.rand(1 << MAGNITUDE_BITS, **on) + 0.1) / 127
        return {"patterns": torch.randint(0, 100, shape, **on).to(torch.int8), "levels": levels}

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        from ..reference import pcdvq

        def decode(start: int, stop: int) -> Tensor:
            high = None if self.magnitude is None else self.magnitude[start:stop]
            words, scale = self.words[start:stop], self.scale[start:stop]
            return pcdvq.dequantize(words, high, scale, self.patterns, self.levels, dtype)

        return decode

    @classmethod
    def kernels(cls) -> FormatKernels:
        from ..triton.pcdvq import PcdvqKernels

        return PcdvqKernels()
