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

    def __init__(self, weight: PackedWeight, watched: Sequence[Tensor]):
        super().__init__(weight, watched)
        self._weight = describe(weight)

    def _takes(self, tokens: int, dtype: torch.dtype) -> bool:
        return launch.takes(tokens, dtype)

    def prepare(self, x: Tensor, signs: Tensor | None) -> Tensor:
        return launch.prepare(x, signs, self._format)

    def __call__(self, x: Tensor, signs: Tensor | None, prepared: Tensor | None) -> Tensor:
        return launch.multiply(x, self._weight, self._rows, signs, prepared)
