"""Products with packed weights, for vLLM's linear layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import hf_pcdvq_kernels as ops
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from .coding import Coding
from .shards import Part, Span, check_part, part_of, products, shard_index

_CUT_BY_ROWS = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)


def parameter_name(argument: str, parameter: str = "weight") -> str:
    """The name under which a packed tensor of a weight is stored."""
    return parameter if argument == "weight" else f"{parameter}_{argument}"


class PackedLinearMethod(LinearMethodBase):
    """Keeps the packed tensors of the weights of a layer concatenated, as `weight` and `weight_<suffix>`.

    Args:
        name: of the layer.
        coding: how its weights are packed.
        stored: how many weights the files hold for it: three for q, k and v, or one if they hold one for all.
    """

    def __init__(self, name: str, coding: Coding, stored: int):
        super().__init__()
        self.name, self.coding, self.stored = name, coding, stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate the packed tensors.

        Raises:
            ValueError: tensor parallelism would cut a weight where it cannot be cut.
        """
        self.rows, self.columns = list(output_partition_sizes), input_size_per_partition
        if self.stored == 1:
            self.rows = [sum(self.rows)]
        if len(self.rows) != self.stored:
            raise ValueError(f"{self.name}: vLLM expects {len(self.rows)} weights, the files hold {self.stored}")
        self.parts = [self._part(layer, index, input_size) for index in range(self.stored)]
        for part in self.parts:
            check_part(self.name, self.coding, part)
        self.missing = set()
        tensors = [self._specs(rows) for rows in self.rows]
        self.places = {argument: _spans([specs[argument][0][0] for specs in tensors]) for argument in tensors[0]}
        for argument, places in self.places.items():
            (_, *inner), dtype = tensors[0][argument]
            parameter = nn.Parameter(torch.empty(places[-1].stop, *inner, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._load, argument)
            layer.register_parameter(parameter_name(argument), parameter)
            self.missing |= {(argument, index) for index in range(self.stored)}
        self.groups = products(self.coding, self.rows)
        tables = self.coding.tables(self.columns)
        self.tables = tuple(tables)
        for table, value in tables.items():
            layer.register_buffer(table, value.to(layer.weight.device), persistent=False)

    def _specs(self, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.coding.family.specs(self.coding.format, rows, self.columns)

    def _part(self, layer: nn.Module, index: int, input_size: int) -> Part:
        rows, columns, size = self.rows[index], Span(0, input_size), layer.tp_size
        if size == 1 or type(layer) is ReplicatedLinear:
            return Part(Span(0, rows), columns, rows, input_size)
        if type(layer) is RowParallelLinear:
            start = layer.tp_rank * self.columns
            return Part(Span(0, rows), Span(start, start + self.columns), rows, input_size)
        if type(layer) not in _CUT_BY_ROWS or (self.stored == 1 and type(layer) is not ColumnParallelLinear):
            raise ValueError(
                f"{self.name}: tensor parallelism does not know how to cut the packed weight of a {type(layer).__name__} of "
                f"which the files hold {self.stored} weights; use pipeline parallelism"
            )
        # Ranks share heads of keys and values if there are fewer heads than ranks.
        sharing = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
        start = layer.tp_rank // sharing * rows
        return Part(Span(start, start + rows), columns, rows * size // sharing, input_size)

    def _load(
        self, argument: str, parameter: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None
    ) -> None:
        index = shard_index(shard_id)
        if index >= self.stored or (shard_id is None and self.stored > 1):
            raise ValueError(f"{self.name}: {self.stored} weights are merged; vLLM loads the one called {shard_id!r}")
        part = self.parts[index]
        shape, dtype = self.coding.family.specs(self.coding.format, part.total_rows, part.total_columns)[argument]
        if (tuple(loaded.shape), loaded.dtype) != (shape, dtype):
            raise ValueError(
                f"{self.name}: {parameter_name(argument)} must be {dtype} {list(shape)}, the file holds {loaded.dtype} "
                f"{list(loaded.shape)}"
            )
        place = self.places[argument][index]
        parameter.data[place.start : place.stop].copy_(part_of(loaded, argument, self.coding, part))
        self.missing.discard((argument, index))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises ValueError: a tensor was not loaded."""
        if self.missing:
            names = sorted({parameter_name(argument) for argument, _ in self.missing})
            raise ValueError(f"{self.name}: the files do not hold all of {', '.join(names)}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + bias` for `x` `[..., K]` and the merged weights `W`; rotates `x`. Does not synchronize with the device."""
        tables = {name: getattr(layer, name) for name in self.tables}
        out = []
        for group in self.groups:
            packed = {
                argument: getattr(layer, parameter_name(argument))[places[group[0]].start : places[group[-1]].stop]
                for argument, places in self.places.items()
            }
            arguments = self.coding.arguments(packed, tables)
            out.append(ops.matmul(self.coding.family.family, x, arguments, signs=tables.get("signs")))
        result = out[0] if len(out) == 1 else torch.cat(out, -1)
        return result if bias is None else result + bias


def _spans(lengths: list[int]) -> list[Span]:
    """Where tensors with these lengths lie in their concatenation."""
    spans, start = [], 0
    for length in lengths:
        spans.append(Span(start, start + length))
        start += length
    return spans
