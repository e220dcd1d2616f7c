"""Products on the CPU without PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..direct import DirectProduct
from ..formats import PackedWeight
from . import launch
from .library import describe


class CpuProduct(DirectProduct):
    """See `DirectProduct`."""

    def __init__(self, weight: PackedWeight, signs: Tensor | None, watched: Sequence[Tensor]):
        super().__init__(weight, signs, watched)
        self._weight = describe(weight)

    def _takes(self, tokens: int, dtype: torch.dtype) -> bool:
        return launch.takes(tokens, dtype)

    def prepare(self, x: Tensor) -> Tensor:
        return launch.prepare(x, self.signs, self._format)

    def __call__(self, x: Tensor, prepared: Tensor | None) -> Tensor:
        return launch.multiply(x, self._weight, self._rows, self.signs, prepared)
