"""`QuantEmbedding`: the embedding that replaces `nn.Embedding`. Decodes the rows that are looked up, and no others."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from .packed import PackedModule, copy_rest
from .packed_words import DenseName


class QuantEmbedding(PackedModule, nn.Embedding):
    """An embedding with a packed weight. Its parameters are the packed tensors of `weight`, one row per token.

    A subclass of `nn.Embedding` that changes the rows after looking them up, such as by a factor, keeps doing so: the class
    that replaces it derives from both, and finds these rows where it calls `super().forward`.

    Args:
        embedding: the dense module, possibly on the meta device; not changed.
        codec: the packed format, whose rows do not depend on each other.
        device: device to allocate on.

    Attributes:
        buffers_to_initialize: names of the buffers of such a class, which the model computes.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `codec.multiple`.
    """

    weight = DenseName()

    def __init__(self, embedding: nn.Embedding, codec: Codec, device: torch.device | str | None = None):
        PackedModule.__init__(self, codec, embedding.weight.dtype)
        self._dense_type = type(embedding)
        self._copied = [name for name in vars(embedding) if name not in vars(self)]
        self.buffers_to_initialize = list(embedding._buffers)
        self._copy_rest(embedding, self)
        self.register_packed("weight", tuple(embedding.weight.shape), device)

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, codec: Codec) -> QuantEmbedding:
        """The replacement for a dense embedding when loading, on the meta device."""
        return _like(embedding, codec, "meta")

    @classmethod
    def from_packed(cls, embedding: nn.Embedding, codec: Codec, packed: dict[str, Packed]) -> QuantEmbedding:
        """The replacement for a dense embedding, on its device, from a `weight` that is already packed."""
        module = _like(embedding, codec, embedding.weight.device)
        module.set_packed("weight", packed["weight"])
        return module

    def forward(self, input: Tensor) -> Tensor:
        """The rows `[..., embedding_dim]` of token ids `[...]`, in the dtype of the dense embedding."""
        if not input.numel():  # which no op takes
            return torch.empty(*input.shape, self.embedding_dim, dtype=self.dense_dtype, device=input.device)
        packed, tables = self.packed_tensors("weight"), self.tables_of("weight")
        return self.codec.decode_rows(packed, input, tables, self.dense_dtype)

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """An ordinary embedding, of the class that was packed, with the decoded weight in `dtype`, on the same device."""
        dense: nn.Embedding = object.__new__(self._dense_type)
        nn.Module.__init__(dense)
        self._copy_rest(self, dense)
        dense.weight = nn.Parameter(self.decoded("weight", dtype))
        return dense

    def _copy_rest(self, source: nn.Module, target: nn.Module) -> None:
        """Give `target` what a subclass of `nn.Embedding` computes with: attributes, buffers and modules of `source`."""
        copy_rest(self._copied, source, target)
        for name in self.buffers_to_initialize:
            persistent = name not in source._non_persistent_buffers_set
            target.register_buffer(name, source._buffers[name], persistent)

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, codec={self.codec}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made here cannot be found by their names.
        return _new, (self._dense_type,), self.__dict__


def embedding_obstacle(module: nn.Embedding) -> str | None:
    """Why an embedding cannot be packed, or None if it can. That its forward pass reads its weight is another matter."""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} changes its rows while they are looked up"
    others = [name for name, _ in module.named_parameters(recurse=False) if name != "weight"]
    return f"{type(module).__name__} has parameters besides its weight: {', '.join(others)}" if others else None


def _like(embedding: nn.Embedding, codec: Codec, device: torch.device | str) -> QuantEmbedding:
    module = _new(type(embedding))
    QuantEmbedding.__init__(module, embedding, codec, device)
    return module


def _new(dense: Any) -> Any:
    kind = _packed_class(dense)
    return kind.__new__(kind)


@cache
def _packed_class(dense: Any) -> type[QuantEmbedding]:
    return QuantEmbedding if dense is nn.Embedding else type(f"Quant{dense.__name__}", (dense, QuantEmbedding), {})
