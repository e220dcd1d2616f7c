"""The groups of layers that get the same number of bits, found by structure.

In a decoder block, linear layers with a common input and the same shape form a group: k and v, gate and up; q is one of
its own where it has more heads than they, otherwise it is with them. Fused experts of a layer are a group; experts that are
modules of their own are grouped over their numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.inputs import OriginalInputs, recorded_inputs
from ..modules import dense_weights


@dataclass(frozen=True)
class Group:
    """Modules that get the same number of bits.

    Attributes:
        block: number of the decoder block.
        kind: the names of the modules in the block, joined by " + ": the same in all blocks that are built alike.
        modules: their full names.
        weights: number of weights.
    """

    block: int
    kind: str
    modules: tuple[str, ...]
    weights: int

    @property
    def name(self) -> str:
        return f"{self.block} {self.kind}"


@torch.no_grad()
def find_groups(model: nn.Module, prefix: str, names: list[str], window: Tensor) -> list[Group]:
    """The groups of the modules `names`, in the order in which they run.

    Args:
        model: the dense model.
        prefix: name of its list of decoder blocks. Modules outside are in no group.
        names: linear layers and fused experts.
        window: token ids int64 `[L]` to run the model on.

    Raises:
        NotImplementedError: a module runs twice.
    """
    inside = {name: model.get_submodule(name) for name in names if name.startswith(f"{prefix}.")}
    found = OriginalInputs(list(inside), None)
    with recorded_inputs(inside) as inputs:
        model(input_ids=window[None].to(model.get_input_embeddings().weight.device), use_cache=False)
        found.add(0, inputs)
    order = {name: number for number, name in enumerate(name for group in found.groups() for name in group)}
    leader = {name: group[0] for group in found.groups() for name in group}
    members: dict[tuple, list[str]] = {}
    for name in sorted(inside, key=lambda name: order.get(name, len(order))):
        block, kind = _place(name, prefix)
        # Experts that are modules have inputs of their own, or none: what makes them a group is where they stand.
        common = kind.rpartition(".")[0] if "*" in kind else leader.get(name, name)
        members.setdefault((block, common, *_shapes(inside[name])), []).append(name)
    return [
        _group(key[0], prefix, modules, inside)
        for key, modules in sorted(members.items(), key=lambda item: item[0][0])
    ]


def _place(name: str, prefix: str) -> tuple[int, str]:
    """The number of the block that a module is in, and its name there, with `*` for further numbers."""
    block, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return int(block), re.sub(r"(?<=\.)\d+(?=\.)", "*", rest)


def _shapes(module: nn.Module) -> tuple:
    return tuple(tuple(weight.shape) for weight in dense_weights(module).values())


def _group(block: int, prefix: str, names: list[str], modules: dict[str, nn.Module]) -> Group:
    kinds = dict.fromkeys(_place(name, prefix)[1] for name in names)
    weights = sum(weight.numel() for name in names for weight in dense_weights(modules[name]).values())
    return Group(block, " + ".join(kinds), tuple(names), weights)
