"""The packed tensors of one weight, with what both backends need to know of them. Validated where they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as checks
from .formats import STREAM_RING, CcqLayout, StreamLayout
from .reference import ccq, pcdvq, stream

# `decode(start, stop)` gives the rows from `start` to `stop` of a weight.
Decode = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class PcdvqWeight:
    """See `pcdvq_dequantize` for the tensors."""

    weight: Tensor
    magnitude: Tensor | None
    scale: Tensor
    patterns: Tensor
    levels: Tensor
    columns: int

    row_multiple = 1  # slices of rows begin at multiples of this

    @classmethod
    def checked(cls, op: str, weight, magnitude, scale, patterns, levels) -> PcdvqWeight:
        """Raises TypeError or ValueError, in the name of `op`, for tensors that do not belong together."""
        columns = checks.check_pcdvq(op, weight, magnitude, scale, patterns, levels)
        return cls(weight, magnitude, scale, patterns, levels, columns)

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        def decode(start: int, stop: int) -> Tensor:
            high = None if self.magnitude is None else self.magnitude[start:stop]
            words, scale = self.weight[start:stop], self.scale[start:stop]
            return pcdvq.dequantize(words, high, scale, self.patterns, self.levels, dtype)

        return decode


@dataclass(frozen=True)
class CcqWeight:
    """See `ccq_dequantize` for the tensors."""

    weight: Tensor
    scale: Tensor
    local_scale: Tensor | None
    code_scale: Tensor | None
    code_zero: Tensor | None
    layout: CcqLayout
    columns: int

    row_multiple = 1

    @classmethod
    def checked(cls, op: str, weight, scale, local_scale, code_scale, code_zero, layout: str) -> CcqWeight:
        """Raises TypeError or ValueError, in the name of `op`, for tensors that do not belong together."""
        form = checks.ccq_layout(op, layout)
        columns = checks.check_ccq(op, weight, scale, local_scale, code_scale, code_zero, form)
        return cls(weight, scale, local_scale, code_scale, code_zero, form, columns)

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        packed = (self.weight, self.scale, self.local_scale, self.code_scale, self.code_zero)

        def decode(start: int, stop: int) -> Tensor:
            part = [None if tensor is None else tensor[start:stop] for tensor in packed]
            return ccq.dequantize(*part, self.layout, dtype)

        return decode


@dataclass(frozen=True)
class StreamWeight:
    """See `stream_dequantize` for the tensors."""

    weight: Tensor
    scale: Tensor
    layout: StreamLayout

    row_multiple = STREAM_RING

    @classmethod
    def checked(cls, op: str, weight, scale, bits: float, window: int) -> StreamWeight:
        """Raises TypeError or ValueError, in the name of `op`, for tensors that do not belong together."""
        return cls(weight, scale, checks.check_stream(op, weight, scale, bits, window))

    @property
    def rows(self) -> int:
        return self.scale.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def reference_rows(self, dtype: torch.dtype) -> Decode:
        table = stream.values(self.layout.window, self.weight.device).float()

        def decode(start: int, stop: int) -> Tensor:
            first = start // self.layout.period * self.layout.period_words
            words = self.weight[first : first + self.layout.words(stop - start)]
            return stream.dequantize(words, self.scale[start:stop], table, self.layout, dtype)

        return decode


Weight = PcdvqWeight | CcqWeight | StreamWeight
