"""`num_parameters()` of packed models: Transformers' own would count packed words, a quarter or an eighth as many."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

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
        excluded = exclude_embeddings and isinstance(module, nn.Embedding)
        for name, entry in packed.items():
            words = module._parameters[name]
            if words not in counted and not only_trainable and not excluded:
                total += prod(entry.shape)
            counted.add(words)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in counted or name in tensors:
                continue
            counted.add(parameter)
            embedding = isinstance(module, nn.Embedding) and name == "weight"
            if (parameter.requires_grad or not only_trainable) and not (embedding and exclude_embeddings):
                total += parameter.numel()
    return total
