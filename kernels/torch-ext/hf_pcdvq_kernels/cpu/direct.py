"""Products on the CPU without PyTorch's dispatcher, whose cost a small layer would notice."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ..backend import use_cpu
from ..formats import family_named
from . import launch
from .library import DTYPE_CODES, describe


class DirectProduct:
    """A product with one weight whose arguments were checked once. Copies and pickles as None.

    Args:
        family: family of the weight's format.
        packed: the arguments of the family's ops.
        signs: the signs of the rotation, or None.
        watched: the tensors among these, in any order, which `holds` compares.

    Raises:
        TypeError, ValueError: as `hf_pcdvq_kernels.matmul`; or the weight is not on the CPU.
    """

    __slots__ = ("_addresses", "_columns", "_rows", "_signs", "_tensors", "_weight")

    def __init__(self, family: str, packed: Sequence[Any], signs: Tensor | None, watched: Sequence[Tensor]):
        weight = family_named(family).checked(f"{family}_matmul", *packed)
        if signs is not None:
            checks.check_signs(f"{family}_matmul", signs, weight.columns, weight.weight.device)
        if weight.weight.device.type != "cpu":
            raise ValueError(f"{family}_matmul: the weight is on {weight.weight.device}, expected the CPU")
        self._rows, self._columns = weight.rows, weight.columns
        self._weight, self._signs = describe(weight), None if signs is None else weakref.ref(signs)
        # Weakly, so that a model whose weights are moved to disk does not keep them in memory.
        self._tensors = [weakref.ref(tensor) for tensor in watched]
        self._addresses = [tensor.data_ptr() for tensor in watched]

    def __reduce__(self):
        return type(None), ()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the watched tensors, with the memory that they had."""
        for tensor, own, address in zip(tensors, self._tensors, self._addresses, strict=True):
            if own() is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be multiplied in this way; if not, call the op, which also names what may be wrong with it."""
        if x.ndim == 0 or x.shape[-1] != self._columns or not x.numel():
            return False
        return launch.takes(x.numel() // self._columns, x.dtype)

    def __call__(self, x: Tensor, prepared: Tensor | None) -> Tensor:
        """`x @ W.T` for `x` `[..., K]` that `takes` accepts, and what `prepare` returned for it, or None."""
        signs = None if self._signs is None else self._signs()
        return launch.multiply(x, self._weight, self._rows, signs, prepared)


def can_skip_dispatcher(x: Tensor) -> bool:
    """Whether nothing but the product itself would happen in an op's call: no gradient, tracing, subclass or mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPE_CODES
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and use_cpu(x.device, x.dtype)
    )
