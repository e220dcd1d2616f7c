"""The published CCQ layouts. The formats are documented in `hf_pcdvq/codecs/convolutional.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Argument, Decode, PackedWeight, Specs, words_from_bytes

if TYPE_CHECKING:
    from ..triton.format_kernels import FormatKernels

GROUP = 64  # consecutive inputs of one output channel that share a group scale


@dataclass(frozen=True)
class CcqLayout:
    """How one published CCQ layout cuts a code word into overlapping windows.

    Weight `i` of a group of 64 is in code word `i // len(shifts)`, in the `window_bits` bits from bit
    `shifts[i % len(shifts)]` up; its integer value is that window minus `offset`.
    """

    name: str
    bits: float  # nominal bits per weight
    word_bytes: int  # bytes per code word, the low byte first
    words: int  # code words per group of 64 weights
    shifts: tuple[int, ...]
    window_bits: int
    scale_bits: int  # group-scale bits at the low end of the last word; 0: scales are in a separate tensor

    @property
    def offset(self) -> int:
        return 1 << (self.window_bits - 1)

    @property
    def clustered(self) -> bool:
        """Whether a stored byte is mapped linearly to the code word ("code cluster")."""
        return self.scale_bits == 0

    @property
    def code_bits(self) -> int:
        """Length of a code word: the span of its overlapping windows."""
        return self.shifts[0] + self.window_bits

    @property
    def max_scale(self) -> int:
        """Largest integer group scale."""
        return 15 if self.clustered else (1 << self.scale_bits) - 1


CCQ_LAYOUTS: dict[str, CcqLayout] = {
    layout.name: layout
    for layout in (
        CcqLayout("2.75", 2.75, 1, 22, (4, 2, 0), window_bits=4, scale_bits=4),
        CcqLayout("2.5", 2.5, 2, 10, (13, 11, 9, 6, 4, 2, 0), window_bits=3, scale_bits=13),
        CcqLayout("2.0625", 2.0625, 1, 16, (9, 6, 3, 0), window_bits=6, scale_bits=0),
    )
}


def ccq_layout(name: str) -> CcqLayout:
    """The published layout of that name.

    Raises:
        ValueError: unknown layout.
    """
    if name not in CCQ_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, CCQ_LAYOUTS))}, got {name!r}")
    return CCQ_LAYOUTS[name]


@dataclass(frozen=True)
class CcqWeight(PackedWeight):
    """CCQ at 2.75, 2.5 or 2.0625 bits (arXiv 2507.07145).

    Args:
        weight: uint8 `[N, K/64*22]` (`"2.75"`), `[N, K/64*20]` (`"2.5"`, words of two bytes) or `[N, K/4]` (`"2.0625"`).
        scale: float32 `[N]`, the super scale of each channel.
        local_scale: uint8 `[N, ceil(K/128)]`, 4-bit group scales, even groups in the high nibble; `"2.0625"` only.
        code_scale: float32 `[N]`, slope of the map from byte to code word; `"2.0625"` only.
        code_zero: float32 `[N]`, its offset; `"2.0625"` only.
        layout: `"2.75"`, `"2.5"` or `"2.0625"`.
    """

    scale: Tensor
    local_scale: Tensor | None
    code_scale: Tensor | None
    code_zero: Tensor | None
    layout_name: str

    family = "ccq"
    names = tuple(f"ccq-{layout}" for layout in CCQ_LAYOUTS)
    arguments = (
        Argument("weight", "Tensor", stacked=True),
        Argument("scale", "Tensor", stacked=True),
        Argument("local_scale", "Tensor?", stacked=True),
        Argument("code_scale", "Tensor?", stacked=True),
        Argument("code_zero", "Tensor?", stacked=True),
        Argument("layout", "str"),
    )
    has_kernels = True
    on_cpu = True

    @cached_property
    def layout(self) -> CcqLayout:
        return ccq_layout(self.layout_name)

    @cached_property
    def words(self) -> Tensor:
        """The code words of the weight, `[N, words]`: uint8, or int16 where a word has two bytes."""
        return words_from_bytes(self.weight) if self.layout.word_bytes == 2 else self.weight

    @cached_property
    def name(self) -> str:
        return f"ccq-{self.layout.name}"

    @classmethod
    def multiple(cls, name: str) -> int:
        return GROUP

    @classmethod
    def column_multiple(cls, name: str) -> int:
        # The scales of two groups share a byte of `local_scale`.
        return 2 * GROUP if ccq_layout(name.removeprefix("ccq-")).clustered else GROUP

    @classmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        layout, groups = ccq_layout(name.removeprefix("ccq-")), columns // GROUP
        specs: Specs = {
            "weight": ((rows, groups * layout.words * layout.word_bytes), torch.uint8),
            "scale": ((rows,), torch.float32),
        }
        if layout.clustered:
            specs["local_scale"] = ((rows, (groups + 1) // 2), torch.uint8)
            specs["code_scale"] = ((rows,), torch.float32)
            specs["code_zero"] = ((rows,), torch.float32)
        return specs

    @classmethod
    def parameters(cls, name: str) -> dict[str, Any]:
        return {"layout": name.removeprefix("ccq-")}

    @classmethod
    def random_scales(cls, name: str) -> dict[str, float]:
        return {"code_scale": 100, "code_zero": 50} if name == "ccq-2.0625" else {"scale": 1 / 100}

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        from ..reference import ccq

        packed = (self.words, self.scale, self.local_scale, self.code_scale, self.code_zero)

        def decode(start: int, stop: int) -> Tensor:
            part = [None if tensor is None else tensor[start:stop] for tensor in packed]
            return ccq.dequantize(*part, self.layout, dtype)

        return decode

    @classmethod
    def kernels(cls) -> FormatKernels:
        from ..triton.ccq import CcqKernels

        return CcqKernels()
