"""What the ops know of a packed format: their arguments, the shapes of its tensors, its implementations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from .. import _checks as checks

if TYPE_CHECKING:
    from ..triton.format_kernels import FormatKernels

# `decode(start, stop)` returns rows `start` to `stop` (exclusive) of a weight.
Decode = Callable[[int, int], Tensor]
# Shape and dtype of tensors, by argument name.
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Argument:
    """One argument of the ops of a family.

    Attributes:
        name: as in the op's schema and in `Specs`.
        type: as in the op's schema: `"Tensor"`, `"Tensor?"`, `"str"`, `"float"`, `"int"`.
        stacked: whether each weight has its own, so that a stack of weights has a stack of them.
    """

    name: str
    type: str
    stacked: bool = False


@dataclass(frozen=True)
class PackedWeight(ABC):
    """The packed tensors of one weight `[N, K]`. A subclass describes one family of formats.

    Its fields are the arguments of the ops, in order; `scale` `[N]` must be among them. Everything else that the ops need
    is derived from what is declared here. `checked` creates validated instances.

    Attributes:
        family: prefix of the names of the ops: `<family>_dequantize`, `<family>_matmul`, `<family>_grouped_matmul`.
        names: names of the family's formats, usually `"<family>-<bits>"`.
        arguments: the packed tensors, tables and scalars that the ops take.
        row_multiple: slices of rows must start at multiples of this.
        has_kernels: whether the family has Triton kernels, which `kernels` imports.
        on_cpu: whether the library of the CPU backend has kernels for its formats.
    """

    weight: Tensor

    family: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    arguments: ClassVar[tuple[Argument, ...]]
    row_multiple: ClassVar[int] = 1
    has_kernels: ClassVar[bool] = False
    on_cpu: ClassVar[bool] = False

    # ------------------------------------------------------------------------- the formats of the family, by name

    @classmethod
    @abstractmethod
    def multiple(cls, name: str) -> int:
        """The number of inputs of a weight in this format must be a multiple of this."""

    @classmethod
    def column_multiple(cls, name: str) -> int:
        """Slices of inputs must start at multiples of this: no word of any tensor then belongs to two of them."""
        return cls.multiple(name)

    @classmethod
    @abstractmethod
    def specs(cls, name: str, rows: int, columns: int) -> Specs:
        """Shape and dtype of the packed tensors of a weight `[rows, columns]`, except those that the format lacks."""

    @classmethod
    def table_specs(cls, name: str) -> Specs:
        """Shape and dtype of the tables that all weights share; empty unless the format has a codebook."""
        return {}

    @classmethod
    def parameters(cls, name: str) -> dict[str, Any]:
        """The non-tensor arguments, with default values for what the format's name does not determine."""
        return {}

    @classmethod
    def random_tables(cls, name: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tables, on the generator's device."""
        return {}

    @classmethod
    def random_scales(cls, name: str) -> dict[str, float]:
        """Factors for uniform random numbers of about 1, by argument; 1 for those not listed."""
        return {}

    # ---------------------------------------------------------------------------------------------- one weight

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this weight's format. Raises ValueError if its arguments match no format."""

    @property
    def rows(self) -> int:
        """`N`."""
        return self.weight.shape[0]

    @cached_property
    def columns(self) -> int:
        """`K`."""
        name = self.name
        return self.weight.shape[1] // self._unit_words(name) * self.multiple(name)

    @classmethod
    @cache
    def _unit_words(cls, name: str) -> int:
        """Number of words along the inputs that hold `multiple` of them."""
        return cls.specs(name, cls.row_multiple, cls.multiple(name))["weight"][0][1]

    @classmethod
    def checked(cls, op: str, *arguments: Any) -> Self:
        """Create a weight from an op's arguments.

        Raises:
            TypeError, ValueError: the arguments do not fit together; the message names `op`.
        """
        made = cls(*arguments)
        try:
            name = made.name
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
        checks.check_words(op, made.weight, cls._unit_words(name))
        scale = getattr(made, "scale", None)
        if scale is not None and (scale.ndim != 1 or len(scale) == 0):
            raise ValueError(f"{op}: scale must be [N], got {list(scale.shape)}")
        expected = {**cls.specs(name, made.rows, made.columns), **cls.table_specs(name)}
        for argument in cls.arguments:
            if argument.name in expected:
                shape, dtype = expected[argument.name]
                tensor = getattr(made, argument.name)
                checks.check_tensor(op, argument.name, tensor, dtype, shape, made.weight.device)
            elif argument.type == "Tensor?":
                checks.check_none(op, argument.name, getattr(made, argument.name), f"for {name}")
        return made

    # ------------------------------------------------------------------------------------------- implementations

    @abstractmethod
    def reference_rows(self, dtype: torch.dtype) -> Decode:
        """A function that decodes slices of rows in plain PyTorch: computes in float32, rounds once to `dtype`."""

    def reference_matmul(self, x: Tensor, transposed: bool) -> Tensor:
        """`x @ W.T`, or `x @ W` if `transposed`, in plain PyTorch; `x` is already rotated."""
        from ..reference.products import decoded_matmul

        return decoded_matmul(x, self, transposed)

    @classmethod
    def kernels(cls) -> FormatKernels:
        """The Triton kernels of the family, imported on demand.

        Raises:
            ValueError: the family has none.
        """
        raise ValueError(f"formats of the family {cls.family!r} have no Triton kernels")


def words_from_bytes(stored: Tensor) -> Tensor:
    """16-bit words stored as little-endian bytes: uint8 `[..., 2 n]` -> int16 `[..., n]`, whose bits are the words.

    A view, without a copy unless the bytes start at an odd address, where no 16-bit word may be.
    """
    odd = stored.data_ptr() % 2 or stored.storage_offset() % 2
    return (stored.clone() if odd else stored).view(torch.int16)


def bytes_from_words(words: Tensor) -> Tensor:
    """How words are stored, the inverse of `words_from_bytes`: integers `[..., n]` -> uint8 `[..., 2 n]`.

    As bytes because collectives (NCCL, gloo) do not know 16-bit integers. Only the low 16 bits of `words` count.
    """
    return words.to(torch.int16).contiguous().view(torch.uint8)
