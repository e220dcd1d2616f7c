"""Products of a layer without PyTorch's dispatcher and without the checks of an op, which cost the host more than a small product takes."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from .backend import use_cpu, use_triton
from .cpu.library import DTYPE_CODES
from .formats import PackedWeight, family_named

_TRITON_DTYPES = (torch.float16, torch.bfloat16)
SHARED_TOKENS = 64  # of which prepared activations are kept for several products


class DirectProduct(ABC):
    """A product with one weight whose arguments were checked once. Copies and pickles as None.

    Args:
        weight: the weight.
        watched: its tensors and the signs of the rotation, in any order, which `holds` compares.
    """

    def __init__(self, weight: PackedWeight, watched: Sequence[Tensor]):
        self._rows, self._columns, self._format = weight.rows, weight.columns, weight.name
        self._device = weight.weight.device
        self._watch(watched)

    def __reduce__(self):
        return type(None), ()

    def _watch(self, tensors: Sequence[Tensor]) -> None:
        # Weakly, so that a model whose weights are moved to disk does not keep them in memory.
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._kinds = [_kind(tensor) for tensor in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the watched tensors, or others of the same kind in the same memory: tensor parallelism makes new ones
        for every call. The watched ones may have been moved; that they keep their shapes is taken for granted."""
        for tensor, own, address in zip(tensors, self._tensors, self._addresses, strict=True):
            if own() is not tensor or tensor.data_ptr() != address:
                break
        else:
            return True
        if [_kind(tensor) for tensor in tensors] != self._kinds or [
            tensor.data_ptr() for tensor in tensors
        ] != self._addresses:
            return False
        self._watch(tensors)
        return True

    def shares(self, x: Tensor) -> bool:
        """Whether products of `x` gain by preparing it once. For many tokens that takes little of their time, but memory."""
        return x.numel() <= SHARED_TOKENS * self._columns

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be multiplied in this way; if not, call the op, which also names what may be wrong with it."""
        fits = x.ndim > 0 and x.shape[-1] == self._columns and x.numel() > 0 and x.device == self._device
        return fits and self._takes(x.numel() // self._columns, x.dtype)

    @abstractmethod
    def _takes(self, tokens: int, dtype: torch.dtype) -> bool:
        """Whether kernels multiply so many tokens straight from the codes."""

    @abstractmethod
    def prepare(self, x: Tensor, signs: Tensor | None) -> Tensor:
        """What `hf_pcdvq_kernels.prepare` returns for `x` `[..., K]` that `takes` accepts."""

    @abstractmethod
    def __call__(self, x: Tensor, signs: Tensor | None, prepared: Tensor | None) -> Tensor:
        """`x @ W.T` for `x` `[..., K]` that `takes` accepts, rotated with the signs that were checked, and what `prepare` returned for
        it, or None."""


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def direct_product(
    family: str, packed: Sequence[Any], signs: Tensor | None, watched: Sequence[Tensor]
) -> DirectProduct:
    """The product for a weight on the device where it is.

    Args:
        family: family of the weight's format.
        packed: the arguments of the family's ops.
        signs: the signs of the rotation, or None.
        watched: see `DirectProduct`.

    Raises:
        TypeError, ValueError: as `hf_pcdvq_kernels.matmul`.
    """
    weight = family_named(family).checked(f"{family}_matmul", *packed)
    if signs is not None:
        checks.check_signs(f"{family}_matmul", signs, weight.columns, weight.weight.device)
    if weight.weight.is_cpu:
        from .cpu.direct import CpuProduct

        return CpuProduct(weight, watched)
    from .triton.direct import TritonProduct

    return TritonProduct(weight, watched)


def can_skip_dispatcher(x: Tensor, family: type[PackedWeight]) -> bool:
    """Whether nothing but the product itself, by kernels, would happen in an op's call with weights of a family: no
    gradient, tracing, subclass or mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and _has_kernels(x, family)
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _has_kernels(x: Tensor, family: type[PackedWeight]) -> bool:
    # Triton's interpreter, which is for tests of the ops, is not asked.
    if x.is_cpu:
        return family.on_cpu and x.dtype in DTYPE_CODES and use_cpu(x.device, x.dtype)
    return family.has_kernels and x.is_cuda and x.dtype in _TRITON_DTYPES and use_triton(x.device, x.dtype)
