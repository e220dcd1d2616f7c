"""The codec interface: a frozen description of a packed format that can encode, decode and multiply.

A codec does not depend on Transformers and holds no tensors. The tensors of one weight are passed as a dictionary
from suffix to tensor: `""` is the packed weight itself, `"scale"` its scales, and so on; a module stores them as
parameters `weight`, `weight_scale`, ... Tables that all weights share (codebook, rotation signs) are passed in a
separate dictionary, created by `tables`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import hf_pcdvq_kernels as ops
import torch
from hf_pcdvq_kernels.formats import PackedWeight
from torch import Tensor

from . import hadamard

Packed = dict[str, Tensor]
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]

# Weights encoded or decoded at a time: float32 and index temporaries, about 40 bytes per weight, stay near 160 MiB on
# a CPU however large the layer is. An accelerator needs larger slices to be kept busy.
_SLICE = {"cpu": 1 << 22}
_SLICE_ACCELERATOR = 1 << 25


def slice_size(device: torch.device) -> int:
    """How many weights are encoded or decoded at a time, at most."""
    return _SLICE.get(device.type, _SLICE_ACCELERATOR)


def _slice_rows(columns: int, device: torch.device, multiple: int) -> int:
    return max(1, slice_size(device) // columns // multiple) * multiple


class UnitEncoder(ABC):
    """Encodes a rotated weight `[N, K]` unit by unit, at scales fixed in advance, as error feedback requires.

    A unit is the smallest slice of columns that the format can encode independently of the others.

    Attributes:
        rows: `N`.
        units: the slices of columns, in order; together they cover `K`.
    """

    rows: int
    units: list[slice]

    @abstractmethod
    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Find the codes nearest to a float32 target `[N, width of the unit]`.

        Returns:
            Codes int32 `[N]`, and the weights that they decode to, float32 `[N, width]`.
        """

    def improved(self, change: Tensor) -> Tensor:
        """Which rows should take new codes for a unit, given the `change` in their losses, float32 `[N]`.

        Rows whose codes depend on each other take them all or not at all.

        Returns:
            bool `[N]`.
        """
        return change < 0

    def weigh(self, importance: Tensor) -> None:  # noqa: B027  # nothing to do where rows do not depend on each other
        """Let errors in every row cost in proportion to its `importance`, float32 `[N]`, where rows share codes."""

    @abstractmethod
    def rescale(self, factor: Tensor) -> None:
        """Multiply the scale of every row by `factor`, float32 `[N]`; all codes then decode to that multiple."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Packed:
        """Pack codes, int32 `[N, number of units]`."""


@dataclass(frozen=True)
class Codec(ABC):
    """A packed format for weights `[N, K]`: `N` output channels, `K` input features.

    A subclass defines how weights are encoded. The layout of the packed tensors, and how they are decoded and
    multiplied, are defined by the description of its family in `hf_pcdvq_kernels.formats`.

    Attributes:
        max_block: the largest Hadamard block; 0 disables the rotation.
        seed: seed of the rotation's signs.
        family: the description of the format's family.
        method: the quantization method whose config describes the codec; None if it is available in overrides only.
    """

    max_block: int
    seed: int

    family: ClassVar[type[PackedWeight]]
    method: ClassVar[str | None]

    # --------------------------------------------------------------------------------------- how it is configured

    @classmethod
    @abstractmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        """The named settings of this codec, each with the config fields that describe it."""

    @classmethod
    @abstractmethod
    def of(cls, max_block: int, seed: int, *args: Any, **fields: Any) -> Self:
        """The codec that the fields of a config describe.

        Raises:
            ValueError: a field has a value that is not allowed.
        """

    # ----------------------------------------------------------------------------------------------- the format

    @property
    @abstractmethod
    def format(self) -> str:
        """The name of the packed format: `"pcdvq-2.25"`, `"stream-2.0"` and so on."""

    def details(self) -> list[str]:
        """Properties of the codec that a user should know besides its format, in words."""
        return [] if self.max_block else ["not rotated"]

    @property
    @abstractmethod
    def bits(self) -> float:
        """Nominal bits per weight: codes only, excluding per-channel scales."""

    @property
    def multiple(self) -> int:
        """The number of input features must be a multiple of this."""
        return self.family.multiple(self.format)

    @property
    def row_multiple(self) -> int:
        """Packed tensors can be split at multiples of this many output channels."""
        return self.family.row_multiple

    def column_multiple(self, in_features: int) -> int:
        """Packed tensors of a weight with that many inputs can be split at multiples of this many of them.

        The rotation of every part is then that of the whole: see `hadamard`.
        """
        block = hadamard.block_size(in_features, self.max_block) if self.max_block else 1
        return math.lcm(self.family.column_multiple(self.format), block)

    def along_inputs(self) -> set[str]:
        """Suffixes of the packed tensors whose last dimension runs along the inputs; others hold one value per output."""
        width = self.family.column_multiple(self.format)
        one, two = (self.specs(self.row_multiple, count * width) for count in (1, 2))
        return {suffix for suffix in one if one[suffix] != two[suffix]}

    def specs(self, out_features: int, in_features: int) -> Specs:
        """Shape and dtype of every packed tensor, by suffix."""
        specs = self.family.specs(self.format, out_features, in_features)
        return {_suffix(name): spec for name, spec in specs.items()}

    def parameters(self) -> dict[str, Any]:
        """The non-tensor arguments of the format's ops. Traced by `torch.compile` in every product."""
        return {}

    def rows(self, packed: Packed, start: int, stop: int) -> Packed:
        """The packed tensors of output channels `start` to `stop`; `start` is a multiple of `row_multiple`."""
        stop = min(stop, len(packed["scale"]))
        first, last = (self.specs(rows, self.multiple) for rows in (start, stop))
        return {suffix: tensor[first[suffix][0][0] : last[suffix][0][0]] for suffix, tensor in packed.items()}

    def with_factor(self, packed: Packed, factor: Tensor) -> Packed:
        """The packed tensors of the weight, or of the stack of weights, whose rows are multiplied by a factor.

        Codes are the same tensors; in all formats here a row's scale is a factor of everything that it decodes to. The
        product is rounded once to the dtype of the scale, and stays finite.

        Args:
            factor: `[N]`, or `[E, N]` for a stack, in any floating-point dtype.
        """
        scale = packed["scale"]
        largest = torch.finfo(scale.dtype).max
        product = (scale.double() * factor.double()).clamp(-largest, largest)
        return {**packed, "scale": product.to(scale.dtype)}

    # ------------------------------------------------------------------------------------------------- encoding

    @abstractmethod
    def encode_rotated(self, weight: Tensor) -> Packed:
        """Round a rotated float32 weight `[N, K]` to the nearest codes."""

    @abstractmethod
    def unit_encoder(self, weight: Tensor) -> UnitEncoder:
        """An encoder with scales chosen for a rotated float32 weight `[N, K]`."""

    # ------------------------------------------------------------------------------------ decoding and multiplying

    def decode_rotated(self, packed: Packed, tables: Packed, dtype: torch.dtype) -> Tensor:
        """Decode to the rotated weight `[N, K]`."""
        return ops.dequantize(self.family.family, self.arguments(packed, tables), dtype)

    def matmul(self, x: Tensor, packed: Packed, tables: Packed, prepared: Tensor | None = None) -> Tensor:
        """`x @ W.T` for activations `[..., K]` and the weight that `decode` returns, in its original basis.

        `prepared` is the result of `hf_pcdvq_kernels.prepare` for the same `x` and this format.
        """
        arguments = self.arguments(packed, tables)
        return ops.matmul(self.family.family, x, arguments, signs=tables.get("signs"), prepared=prepared)

    @property
    def has_kernels(self) -> bool:
        """Whether the format has kernels for products, on devices that support them."""
        return self.family.has_kernels

    def grouped_matmul(self, x: Tensor, experts: Tensor, packed: Packed, tables: Packed) -> Tensor | None:
        """`x[g] @ W[experts[g]].T` for stacks of packed tensors, without synchronizing with the device.

        Args:
            x: `[G, T, K]`.
            experts: int32 `[G]`; the product is zero if negative.

        Returns:
            `[G, T, N]` in the dtype of `x`; None if the format has no kernels for it.
        """
        if not self.has_kernels and not (self.family.on_cpu and x.device.type == "cpu"):
            return None
        return ops.grouped_matmul(self.family.family, x, experts, self.arguments(packed, tables), tables.get("signs"))

    def arguments(self, packed: Mapping[str, Any], tables: Mapping[str, Any]) -> list[Any]:
        """The arguments of the ops, in order; of the names of tensors, those with names for tensors."""
        values = {**tables, **self.parameters()}
        names = (argument.name for argument in self.family.arguments)
        return [values[name] if name in values else packed.get(_suffix(name)) for name in names]

    def code_tables(self) -> Packed:
        """Constants needed for decoding, on the CPU; empty unless the format has a codebook."""
        return {}

    def tables(self, in_features: int) -> Packed:
        """All constants that a layer with `in_features` inputs needs, on the CPU."""
        tables = self.code_tables()
        if self.max_block:
            tables["signs"] = hadamard.signs(hadamard.block_size(in_features, self.max_block), self.seed)
        return tables

    def encode(self, weight: Tensor) -> Packed:
        """Round a weight `[N, K]` of any floating-point dtype to the nearest codes, on the weight's device.

        Raises:
            ValueError: the weight is not two-dimensional or floating-point, `K` is not a multiple of `multiple`, or
                values are not finite.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"expected a floating-point weight [N, K], got {weight.dtype} {list(weight.shape)}")
        if weight.shape[1] % self.multiple:
            raise ValueError(f"{weight.shape[1]} input features are not a multiple of {self.multiple}")
        parts = []
        for rows in self._rotated_slices(weight):
            if not torch.isfinite(rows).all():
                raise ValueError("the weight holds infinite or NaN values; the checkpoint is damaged")
            parts.append(self.encode_rotated(rows))
        return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}

    def relative_error(self, weight: Tensor, packed: Packed) -> float:
        """Squared error of `packed`, summed over all entries, relative to the squared norm of `weight` `[N, K]`."""
        tables = {name: table.to(weight.device) for name, table in self.tables(weight.shape[1]).items()}
        start, error, total = 0, 0.0, 0.0
        for rows in self._rotated_slices(weight):  # the rotation preserves norms, so there is no need to rotate back
            part = self.rows(packed, start, start + len(rows))
            start += len(rows)
            error += (
                (self.decode_rotated(part, tables, torch.float32) - rows).square().sum(dtype=torch.float64).item()
            )
            total += rows.square().sum(dtype=torch.float64).item()
        return error / total if total else 0.0

    def _rotated_slices(self, weight: Tensor) -> Iterator[Tensor]:
        """The rotated weight in slices of rows, as float32."""
        signs = self.tables(weight.shape[1])["signs"].to(weight.device) if self.max_block else None
        for rows in weight.detach().split(_slice_rows(weight.shape[1], weight.device, self.row_multiple)):
            rows = rows.float().contiguous()
            yield rows if signs is None else hadamard.rotate(rows, signs)

    def decode(self, packed: Packed, tables: Packed, dtype: torch.dtype) -> Tensor:
        """Decode to the weight `[N, K]` in its original basis; rounds once to `dtype`."""
        if not self.max_block:
            return self.decode_rotated(packed, tables, dtype)
        parts = []
        # An element of the packed weight holds at most 4 weights along the input dimension.
        rows = _slice_rows(4 * packed[""].shape[1], packed[""].device, self.row_multiple)
        for start in range(0, len(packed["scale"]), rows):
            rotated = self.decode_rotated(self.rows(packed, start, start + rows), tables, torch.float32)
            parts.append(hadamard.unrotate(rotated, tables["signs"]).to(dtype))
        return torch.cat(parts)

    def decode_rows(self, packed: Packed, rows: Tensor, tables: Packed, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight that `decode` returns, in a format whose rows do not depend on each other.

        Args:
            rows: their numbers, int `[...]`.

        Returns:
            `[..., K]`.
        """
        chosen = {suffix: tensor.index_select(0, rows.flatten()) for suffix, tensor in packed.items()}
        decoded = self.decode_rotated(chosen, tables, torch.float32 if self.max_block else dtype)
        if self.max_block:
            decoded = hadamard.unrotate(decoded, tables["signs"]).to(dtype)
        return decoded.view(*rows.shape, decoded.shape[-1])


def _suffix(argument: str) -> str:
    """The suffix of a packed tensor; empty for the packed weight itself."""
    return "" if argument == "weight" else argument


def one_of(field: str, value: Any, allowed: tuple) -> Any:
    """Return the value of a field if it is allowed.

    Raises:
        ValueError: it is not allowed.
    """
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def row_scale(weight: Tensor) -> Tensor:
    """Root mean square of every row of a float32 weight `[N, K]`, as float32 `[N]`."""
    return weight.double().square().mean(1).sqrt().float()


def counted_bits(specs: Specs, out_features: int, in_features: int) -> float:
    """Bits per weight that the packed tensors of one layer take on disk, including scales."""
    total = 0
    for shape, dtype in specs.values():
        total += torch.Size(shape).numel() * dtype.itemsize * 8
    return total / (out_features * in_features)
