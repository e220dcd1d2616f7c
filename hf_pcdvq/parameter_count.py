"""`num_parameters()` of packed models: Transformers' own would count packed words, a quarter or an eighth as many."""

from __future__ import annotations

import weakref
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from .modules import PackedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """The number of parameters, as of the dense model: a packed layer counts its weights, not its words and scales.

    Args:
        model: packed or not.
        only_trainable: count those that are trained; packed weights are not.
        exclude_embeddings: leave out the weights of embeddings.
    """
    total, counted = 0, set()
    for module in model.modules():
        packed = module.packed_parameters if isinstance(module, PackedModule) else {}
        tensors = {name for entry in packed.values() for name in entry.tensors.values()}
        if not only_trainable:
            total += sum(prod(entry.shape) for entry in packed.values())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in counted or name in tensors:
                continue
            counted.add(parameter)
            embedding = isinstance(module, nn.Embedding) and name == "weight"
            if (parameter.requires_grad or not only_trainable) and not (embedding and exclude_embeddings):
                total += parameter.numel()
    return total


class _CountOf:
    """`num_parameters` of one model, which it does not keep alive; copied and pickled with the model."""

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        return num_parameters(self._model(), only_trainable, exclude_embeddings)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CountOf:
        return _CountOf(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> tuple[type[_CountOf], tuple[PreTrainedModel]]:
        return _CountOf, (self._model(),)


def count_weights_of(model: nn.Module, packed: bool) -> None:
    """Have the model, and every model in it, count as above if it is packed, or as Transformers does."""
    from transformers import PreTrainedModel  # not when this package is imported: it takes seconds

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop("num_parameters", None)
            if packed:
                part.__dict__["num_parameters"] = _CountOf(part)
