"""Launches a kernel again without asking Triton again what it has compiled for such arguments.

Triton's own call takes the host tens of microseconds to find that out, longer than most products of one token run. Everything but
the pointers is the same here from one launch to the next, so that only their alignment, for which Triton compiles, is left to compare.
Hooks of its compiler that are set later have no effect; those of its launches do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .device import TRITON

_ALIGNMENT = 16  # bytes; what Triton distinguishes
# Before Triton 3.3, a compiled kernel took the arguments without the constants.
_TAKES_CONSTANTS = TRITON >= (3, 3)


class Address:
    """What a launch needs to know of a tensor, which may be freed and moved meanwhile: whoever holds this sees to that."""

    __slots__ = ("_address", "dtype")

    def __init__(self, tensor: Tensor):
        self.dtype, self._address = tensor.dtype, tensor.data_ptr()

    def data_ptr(self) -> int:
        return self._address


class Launcher:
    """A kernel with its grid, sizes, constants and options; its first arguments, the pointers, may differ.

    Args:
        kernel: compiled by Triton, or interpreted.
        grid: up to three numbers of programs.
        sizes: integers by argument.
        constants: constexpr arguments, by name.
        options: of the compiler.
    """

    __slots__ = ("_compiled", "_grid", "_kernel", "_keywords", "_rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        sizes: dict[str, int],
        constants: dict[str, Any],
        options: dict[str, Any],
    ):
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._keywords = {**sizes, **constants, **options}
        given = {**sizes, **constants} if _TAKES_CONSTANTS else sizes
        self._rest = tuple(given[name] for name in kernel.arg_names if name in given)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *pointers: Tensor | Address) -> None:
        """Launch it on the current device and stream."""
        kind = tuple([(pointer.data_ptr() % _ALIGNMENT == 0, pointer.dtype) for pointer in pointers])
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[self._grid](*pointers, *self._rest)
            return
        compiled = self._kernel[self._grid](*pointers, **self._keywords)
        # Not what is still being compiled; and the interpreter compiles nothing.
        if isinstance(compiled, CompiledKernel):
            self._compiled[kind] = compiled


def launcher(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    sizes: dict[str, int],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Launcher:
    """The launcher with these arguments, see `Launcher`; the same one whenever they are the same.

    Args:
        device: the one to launch on, where Triton loads what it has compiled.
    """
    return _launcher(kernel, grid, device, *(tuple(given.items()) for given in (sizes, constants, options)))


# Sizes are those of the layers of a model and of its inputs.
@lru_cache(4096)
def _launcher(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *given: tuple[tuple[str, Any], ...]
) -> Launcher:
    return Launcher(kernel, grid, *map(dict, given))
