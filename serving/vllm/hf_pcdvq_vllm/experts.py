"""Products with packed experts, for vLLM's mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import hf_pcdvq_kernels as ops
import torch
from hf_pcdvq_kernels.routing import tiles_of_tokens
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation

from .coding import Coding
from .linear import parameter_name

STACKS = ("gate_up_proj", "down_proj")


class PackedExpertsMethod(FusedMoEMethodBase):
    """Keeps the packed stacks of all experts of a layer, under the names that they have in the files.

    Args:
        name: of the layer.
        coding: how its stacks are packed.
        moe: vLLM's description of the layer.

    Raises:
        NotImplementedError: the layer is spread over several devices, or has parts that packed experts lack.
    """

    def __init__(self, name: str, coding: Coding, moe: FusedMoEConfig):
        super().__init__(moe)
        self.name, self.coding = name, coding
        parallel = moe.moe_parallel_config
        obstacles = {
            "tensor parallelism": parallel.tp_size > 1,
            "expert parallelism": parallel.use_ep,
            "data parallelism": parallel.dp_size > 1,
            "biases": moe.has_bias,
            "experts without a gate": not moe.is_act_and_mul,
        }
        found = [obstacle for obstacle, present in obstacles.items() if present]
        if found:
            raise NotImplementedError(
                f"{name}: packed experts do not go with {' and '.join(found)} in vLLM; use one device, pipeline parallelism, "
                "or hf-pcdvq serve"
            )

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate the packed stacks, and have the layer load them by their names."""
        if layer.apply_router_weight_on_input:
            raise NotImplementedError(f"{self.name}: weights of the router apply to outputs of packed experts only")
        self.number = num_experts
        shapes = (2 * intermediate_size_per_partition, hidden_size), (hidden_size, intermediate_size_per_partition)
        self.tensors: dict[str, dict[str, str]] = {}
        self.tables: dict[str, dict[str, str]] = {}
        for stack, (rows, columns) in zip(STACKS, shapes):
            specs = self.coding.family.specs(self.coding.format, rows, columns)
            self.tensors[stack] = {argument: parameter_name(argument, stack) for argument in specs}
            for argument, (shape, dtype) in specs.items():
                parameter = nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype), requires_grad=False)
                layer.register_parameter(self.tensors[stack][argument], parameter)
            tables = self.coding.tables(columns)
            self.tables[stack] = {table: f"{stack}_{table}" for table in tables}
            device = getattr(layer, stack).device
            for table, value in tables.items():
                layer.register_buffer(self.tables[stack][table], value.to(device), persistent=False)
        device, sixteen = layer.down_proj.device, params_dtype in (torch.bfloat16, torch.float16)
        if device.type != "cpu" and not (self.coding.family.has_kernels and sixteen):
            # They would be multiplied one after the other, after waiting for the device: no CUDA graph can hold that.
            raise NotImplementedError(
                f"{self.name}: experts in {self.coding.format} with {params_dtype} run on a CPU only"
            )
        self.missing = {name for names in self.tensors.values() for name in names.values()}
        # Its own would take a stack apart into matrices of experts, gates and up projections.
        layer.load_weights = partial(self._load, layer)

    def _load(self, layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        known = {name for names in self.tensors.values() for name in names.values()}
        for name, loaded in weights:
            if name not in known:
                raise ValueError(f"{self.name}: {name} is not one of the packed tensors {', '.join(sorted(known))}")
            parameter = getattr(layer, name)
            if (loaded.shape, loaded.dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(
                    f"{self.name}: {name} must be {parameter.dtype} {list(parameter.shape)}, the file holds {loaded.dtype} "
                    f"{list(loaded.shape)}"
                )
            parameter.data.copy_(loaded)
            self.missing.discard(name)
            yield name

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises ValueError: a tensor was not loaded."""
        if self.missing:
            raise ValueError(f"{self.name}: the files do not hold all of {', '.join(sorted(self.missing))}")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # it is for vLLM's own kernels

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of the outputs of each token's experts, `[T, H]`, in the dtype of `x`; vLLM adds shared experts.

        No shape depends on data, and nothing waits for the device.
        """
        tokens, k = topk_ids.shape
        experts, place, size = tiles_of_tokens(topk_ids.flatten().long(), self.number)  # indices may have 32 bits
        tiles = x.new_zeros(len(experts) * size, x.shape[1])
        tiles[place] = x.repeat_interleave(k, 0)
        gate_up = self._multiply(layer, "gate_up_proj", experts, tiles.view(len(experts), size, -1)).flatten(0, 1)
        activated = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        apply_moe_activation(layer.activation, activated, gate_up)
        out = self._multiply(layer, "down_proj", experts, activated.view(len(experts), size, -1)).flatten(0, 1)
        chosen = out[place].view(tokens, k, -1).float()
        return (chosen * topk_weights[..., None].float()).sum(1).to(x.dtype)

    def _multiply(self, layer: nn.Module, stack: str, experts: Tensor, x: Tensor) -> Tensor:
        packed = {argument: getattr(layer, name) for argument, name in self.tensors[stack].items()}
        tables = {table: getattr(layer, name) for table, name in self.tables[stack].items()}
        arguments = self.coding.arguments(packed, tables)
        return ops.grouped_matmul(self.coding.family.family, x, experts, arguments, tables.get("signs"))
