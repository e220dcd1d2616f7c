"""Tensor and expert parallelism through Transformers: which part of a packed module each process holds.

A plan of Transformers names modules, and its styles cut all tensors of a module alike. The packed tensors of one weight
are not alike: cut by inputs, words are divided and scales are not; in a stack, scales have one dimension less. So every
packed tensor gets a rule of its own, whose style asks the codec; the module keeps its rule, which says how activations
are exchanged. Parts are made at places where they are packed weights themselves: each process computes with its part as
with any other weight, and rotates its inputs with the same signs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers.distributed.expert_parallel import ExpertParallelLayer, MoEParamShard, apply_expert_parallelism
from transformers.distributed.parallel_utils import (
    ALL_PARALLEL_STYLES,
    _get_parameter_plan,
    replace_layer_number_by_wildcard,
)
from transformers.distributed.tensor_parallel import (
    ColwiseParallel,
    PackedColwiseParallel,
    PackedRowwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
    apply_tensor_parallelism,
)

from .codecs import Codec
from .modules import PackedModule, QuantEmbedding
from .modules.tied import tied_to

_PREFIX = "hf_pcdvq:"
_SMALLER_BLOCKS = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class PackedStyle(TensorParallelLayer):
    """Cuts the tensors of packed modules as a stock style cuts the dense weight; other modules it leaves to that style.

    Attributes:
        stock: the style.
        halves: into how many equal parts the weight falls, each of which is cut: two for the gate and up projections
            in one weight.
    """

    stock: Any
    halves: int = 1

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        """Raises ValueError if a packed weight cannot be cut; the message names it and what would work."""
        found = _packed_tensor(module, param)
        if found is None:
            self.stock.validate_param(module, param, mesh, parameter_name=parameter_name)
            return
        parameter, _ = found
        path = (parameter_name or param).rpartition(".")[0]
        name = path if parameter == "weight" else f"{path}.{parameter}"
        problem = self.obstacle(module, parameter, mesh.size(), name)
        if problem:
            raise ValueError(
                f"{name} cannot be divided among {mesh.size()} processes: {problem}, or load with device_map='auto' in one "
                "process"
            )

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        found = _packed_tensor(module, param)
        if found is None:
            self.stock.shard_param(module, param, mesh)
            return
        empty = module._parameters[param]
        cut = distribute_tensor(empty, mesh, [self.placement(module, *found)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(cut, requires_grad=empty.requires_grad)

    @abstractmethod
    def obstacle(self, module: PackedModule, parameter: str, ranks: int, name: str) -> str | None:
        """Why a packed weight cannot be divided among so many processes, and what to do; None if it can. `name`: its path."""

    @abstractmethod
    def placement(self, module: PackedModule, parameter: str, suffix: str) -> Placement:
        """How a tensor of a packed weight is divided."""

    def _uneven(self, size: int, multiple: int, ranks: int) -> str | None:
        """What is wrong with so many outputs or inputs, if parts begin at a multiple of `multiple`."""
        wanted = multiple * ranks
        if size % (wanted * self.halves) == 0:
            return None
        each = "" if self.halves == 1 else f"{self.halves} times "
        return f"{each}{size // self.halves} {{}} are not a multiple of {wanted} (each process takes a multiple of {multiple})"

    def _shard(self, dimension: int) -> Placement:
        return Shard(dimension) if self.halves == 1 else _StridedShard(dimension, split_factor=self.halves)


class ByOutputs(PackedStyle):
    """Column-wise: every process has some of the output channels, with all that belongs to them."""

    def obstacle(self, module: PackedModule, parameter: str, ranks: int, name: str) -> str | None:
        codec, (*stack, rows, _) = module.codec, module.packed_parameters[parameter].shape
        problem = self._uneven(rows, codec.row_multiple, ranks)
        if problem is None:
            return None
        finer = rows % (ranks * self.halves) == 0
        other = ", pack it in a format that is cut at every output (overrides: 'int8', 'pcdvq-2.25')" if finer else ""
        return f"in {codec.format}, {problem.format('outputs')}. Take fewer processes{other}, {_whole(bool(stack), ranks, name)}"

    def placement(self, module: PackedModule, parameter: str, suffix: str) -> Placement:
        return self._shard(len(module.packed_parameters[parameter].shape) - 2)


class ByInputs(PackedStyle):
    """Row-wise: every process has some of the inputs, and what belongs to output channels as a whole."""

    def obstacle(self, module: PackedModule, parameter: str, ranks: int, name: str) -> str | None:
        codec, (*stack, _, columns) = module.codec, module.packed_parameters[parameter].shape
        problem = self._uneven(columns, codec.column_multiple(columns), ranks)
        if problem is None:
            return None
        finer = next((block for block in _SMALLER_BLOCKS if self._fits(codec, block, columns, ranks)), None)
        other = f", pack it with hadamard_block={finer}" if finer else ""
        return f"in {codec.format}, {problem.format('inputs')}. Take fewer processes{other}, {_whole(bool(stack), ranks, name)}"

    def _fits(self, codec: Codec, block: int, columns: int, ranks: int) -> bool:
        smaller = replace(codec, max_block=min(codec.max_block, block))
        return self._uneven(columns, smaller.column_multiple(columns), ranks) is None

    def placement(self, module: PackedModule, parameter: str, suffix: str) -> Placement:
        if suffix not in module.codec.along_inputs():
            return Replicate()
        return self._shard(len(module.packed_parameters[parameter].shape) - 1)


class ByExperts(PackedStyle):
    """Expert parallelism: every process has some of the experts."""

    def obstacle(self, module: PackedModule, parameter: str, ranks: int, name: str) -> str | None:
        experts = module.packed_parameters[parameter].shape[0]
        return None if experts % ranks == 0 else f"it has {experts} experts. Take an ep_size that divides {experts}"

    def placement(self, module: PackedModule, parameter: str, suffix: str) -> Placement:
        return Shard(0)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        self.stock.shard_param(module, param, mesh)  # which also tells the module how many experts it has


class Unknown(PackedStyle):
    """A style that cuts weights in a way that is not known here: refuses packed ones, whose tensors are not alike."""

    def obstacle(self, module: PackedModule, parameter: str, ranks: int, name: str) -> str | None:
        style = next(name for name, style in ALL_PARALLEL_STYLES.items() if style is self.stock)
        advice = _whole(len(module.packed_parameters[parameter].shape) > 2, ranks, name)
        return (
            f"it is not known how the parallel style {style!r} ({type(self.stock).__name__}) cuts packed weights. Take one of "
            f"Transformers' own, such as 'colwise' or 'rowwise', {advice}"
        )

    def placement(self, module: PackedModule, parameter: str, suffix: str) -> Placement:
        raise NotImplementedError(f"{type(self.stock).__name__} cuts no packed weights")


def _whole(stack: bool, ranks: int, name: str) -> str:
    """What to do with a weight that cannot be cut."""
    if stack:
        return f"give whole experts to processes: DistributedConfig(tp_size={ranks}, ep_size={ranks})"
    rule = f"{replace_layer_number_by_wildcard(name)!r}: 'replicate'"
    return (
        f"keep it and the layers that it exchanges activations with whole: DistributedConfig(tp_plan={{{rule}, ...}})"
    )


# By the exact type of the stock style: what inherits from it may cut otherwise. Styles that cut nothing need none.
_KINDS: dict[type, tuple[type[PackedStyle], int]] = {
    ColwiseParallel: (ByOutputs, 1),
    PackedColwiseParallel: (ByOutputs, 2),
    RowwiseParallel: (ByInputs, 1),
    PackedRowwiseParallel: (ByInputs, 2),
    MoEParamShard: (ByExperts, 1),
}


def register_styles() -> None:
    """Register, beside each style of Transformers that cuts weights, the one for packed tensors. Idempotent.

    Others that cut weights, such as those that a user has registered, get one that refuses packed weights.
    """
    for name, stock in list(ALL_PARALLEL_STYLES.items()):
        if _cuts(stock):
            kind, halves = _KINDS.get(type(stock), (Unknown, 1))
            ALL_PARALLEL_STYLES.register(_PREFIX + name, kind(stock, halves))


def _cuts(style: Any) -> bool:
    """Whether a style of Transformers or of a user divides weights."""
    whole = (TensorParallelLayer.shard_param, ExpertParallelLayer.shard_param)
    return not isinstance(style, PackedStyle) and type(style).shard_param not in whole


def _packed_tensor(module: nn.Module, name: str) -> tuple[str, str] | None:
    """The dense parameter and the suffix that a packed tensor stands for; None for any other parameter."""
    if isinstance(module, PackedModule):
        for parameter, entry in module.packed_parameters.items():
            for suffix, tensor in entry.tensors.items():
                if tensor == name:
                    return parameter, suffix
    return None


class PackedPlan(dict[str, str]):
    """A plan of Transformers with rules for packed tensors, which follow from those for the dense parameters.

    `DistributedConfig(tp_plan={...})` is merged into a model's plan later; packed tensors then follow what was given.

    Args:
        rules: the plan for the dense model: styles by names of modules and parameters, with `*` for numbers of layers.
        tensors: names of packed tensors by the name of the dense parameter, likewise.
    """

    def __init__(self, rules: Mapping[str, str], tensors: Mapping[str, set[str]]):
        super().__init__(rules)
        self._rules, self._tensors = dict(rules), tensors
        for parameter, names in tensors.items():
            style = f"{_PREFIX}{_get_parameter_plan(parameter, self._rules)}"
            if style in ALL_PARALLEL_STYLES:
                self.update(dict.fromkeys(names, style))

    def __or__(self, given: Mapping[str, str]) -> PackedPlan:  # type: ignore[override]
        return PackedPlan({**self._rules, **given}, self._tensors)


def packed_plan(model: nn.Module, rules: Mapping[str, str]) -> PackedPlan:
    """The plan `rules` of a model, whose packed modules are in place, with rules for their tensors.

    Packed embeddings, and a head with the same tensors, are whole in every process.
    """
    register_styles()
    embeddings = [path for path, module in model.named_modules() if isinstance(module, QuantEmbedding)]
    undivided = {other for path in embeddings for other in (path, *tied_to(model, path))}
    rules = {**rules, **{replace_layer_number_by_wildcard(path): "replicate" for path in undivided}}
    tensors: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        for parameter, entry in module.packed_parameters.items() if isinstance(module, PackedModule) else ():
            dense = replace_layer_number_by_wildcard(f"{path}.{parameter}")
            names = {replace_layer_number_by_wildcard(f"{path}.{tensor}") for tensor in entry.tensors.values()}
            tensors.setdefault(dense, set()).update(names)
    return PackedPlan(rules, tensors)


def parallelize(model: nn.Module, names: list[str]) -> None:
    """Have modules that took the place of others exchange activations as those did. Their parameters are cut already."""
    config = model.config.distributed_config
    plans = {"tp": model.tp_plan if config.tp_size > 1 else {}, "ep": model.ep_plan if config.ep_size > 1 else {}}
    styles = {
        kind: {name: style for name in names if (style := _get_parameter_plan(name, plan, is_weight=False))}
        for kind, plan in plans.items()
    }
    meshes = model._mesh_manager
    within = {name: style for name, style in styles["tp"].items() if name not in styles["ep"]}
    apply_tensor_parallelism(model, meshes.get_mesh("tp"), within)
    if styles["ep"]:
        apply_expert_parallelism(
            model, meshes.get_mesh("ep"), meshes.get_mesh("tp"), styles["ep"], config.ep_implementation
        )
