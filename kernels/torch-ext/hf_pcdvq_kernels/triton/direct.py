"""Products on a GPU without PyTorch's dispatcher, and with what Triton has compiled at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..direct import DirectProduct
from ..formats import PackedWeight
from . import product, tuned
from .launch_config import DOT_TOKENS, kernels_of
from .launcher import Address


class TritonProduct(DirectProduct):
    """See `DirectProduct`. Numbers of tokens that no kernel takes are left to the op."""

    def __init__(self, weight: PackedWeight, watched: Sequence[Tensor]):
        super().__init__(weight, watched)
        operands = kernels_of(weight.name).operands(weight).values()
        # A copy that was made for its alignment belongs to nobody, so its address would not stay valid.
        kept = all(operand.data_ptr() in self._addresses for operand in operands)
        self._has_kernel = kept and product.has_kernel(weight, 1, torch.float16)
        self._operands = tuple(Address(operand) for operand in operands)
        self._kind = _without_memory(weight)
        self._products: dict[tuple[Any, ...], product.Product] = {}
        self._configs = tuned.load(self._device)

    def _takes(self, tokens: int, dtype: torch.dtype) -> bool:
        return self._has_kernel and tokens <= DOT_TOKENS

    def prepare(self, x: Tensor, signs: Tensor | None) -> Tensor:
        return product.prepare(x, signs, self._format)

    def __call__(self, x: Tensor, signs: Tensor | None, prepared: Tensor | None) -> Tensor:
        configs = tuned.load(self._device)
        if self._configs is not configs:  # measured meanwhile
            self._products.clear()
            self._configs = configs
        tokens = x.numel() // self._columns
        kind = (tokens, x.dtype, prepared is None)
        launched = self._products.get(kind)
        if launched is None:
            launched = product.Product(self._kind, tokens, x.dtype, self._device, prepared=prepared is not None)
            self._products[kind] = launched
        shape = (*x.shape[:-1], self._rows)
        return launched(x.contiguous(), self._operands, signs, prepared, None, shape)


def _without_memory(weight: PackedWeight) -> PackedWeight:
    """The same weight on the meta device, for its shapes."""
    own = (getattr(weight, field.name) for field in fields(weight))
    return type(weight)(*(value.to("meta") if isinstance(value, Tensor) else value for value in own))
