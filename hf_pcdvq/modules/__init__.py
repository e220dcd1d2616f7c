"""Modules that hold packed weights in place of dense ones."""

from torch import nn

from .embedding import QuantEmbedding, embedding_obstacle
from .experts import STACKS, QuantExperts, experts_obstacle, is_fused_experts
from .linear import QuantLinear, share_inputs
from .packed import (
    PackedModule,
    decode_stack,
    encode_stack,
    packed_modules,
    parameter_name,
    stack_packed,
    unstack_packed,
)
from .shared_input import unshare_inputs


def packed_type(module: nn.Module) -> type[QuantLinear] | type[QuantEmbedding] | type[QuantExperts]:
    """The class that replaces a dense module."""
    if isinstance(module, nn.Linear):
        return QuantLinear
    return QuantEmbedding if isinstance(module, nn.Embedding) else QuantExperts


def dense_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a dense module that are packed: the `weight` of a layer or an embedding, or the stacks of fused
    experts."""
    names = ("weight",) if isinstance(module, (nn.Linear, nn.Embedding)) else STACKS
    return {name: getattr(module, name) for name in names}


def count_matrices(module: nn.Module) -> int:
    """The number of matrices to pack in a dense module: one for a layer or an embedding, two for each fused expert."""
    return sum(1 if weight.ndim == 2 else len(weight) for weight in dense_weights(module).values())


__all__ = [
    "STACKS",
    "PackedModule",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "count_matrices",
    "decode_stack",
    "dense_weights",
    "embedding_obstacle",
    "encode_stack",
    "experts_obstacle",
    "is_fused_experts",
    "packed_modules",
    "packed_type",
    "parameter_name",
    "share_inputs",
    "stack_packed",
    "unshare_inputs",
    "unstack_packed",
]
