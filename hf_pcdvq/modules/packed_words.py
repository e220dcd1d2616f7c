"""What stands for a dense parameter that is packed: other code that looks for the parameter finds where it is, but
nothing to compute with and nothing to write to.

Packed words keep the name of the dense parameter in the files and in `named_parameters`. Code that reads `layer.weight`
expects floats in the dense shape: adapters that merge into it, initializations, parametrizations, some models. Integers
in another shape would be taken for them, and overwritten without an error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .divided import is_divided, local_part

# What a reader may ask: where the parameter is and whether it is trained.
_PLACE = ("device", "is_cpu", "is_cuda", "is_meta", "layout", "grad", "requires_grad")
_ALLOWED = {getattr(Tensor, name).__get__ for name in _PLACE}
_ALLOWED |= {Tensor.requires_grad.__set__, Tensor.requires_grad_, Tensor.data_ptr, Tensor.__repr__, Tensor.__hash__}


class PackedWords(Tensor):
    """An alias of packed words that raises when anything but its place is read, and when it is written to.

    Its `dtype` is that of the dense parameter: adapters and inputs are cast to it. So is the shape of an embedding, whose
    rows are counted to compare them with a tokenizer. That of a layer raises, because adapters would be made for it.
    """

    _is_param = True  # `isinstance(layer.weight, nn.Parameter)` holds, as for a dense layer
    owner: str  # class of the module, and name of the parameter
    dense_dtype: torch.dtype
    dense_shape: torch.Size | None  # of an embedding
    words: nn.Parameter  # possibly divided among processes

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALLOWED:
            return super().__torch_function__(func, types, args, kwargs)
        alias = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if func == Tensor.dtype.__get__:
            return alias.dense_dtype
        if func in (Tensor.shape.__get__, Tensor.size) and alias.dense_shape is not None:
            dim = (*args[1:], *(kwargs or {}).values())
            return alias.dense_shape[dim[0]] if dim and dim[0] is not None else alias.dense_shape
        if func is Tensor.to and args[0] is alias:
            return alias._moved(*args[1:], **(kwargs or {}))
        raise packed_error(alias.owner, is_divided(alias.words))

    def _moved(self, *args: Any, **kwargs: Any) -> Tensor:
        """The words on another device, for what moves modules parameter by parameter."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self.words.detach().to(device)
        if moved.device == self.device and dtype in (None, self.dtype):
            return self
        if dtype is not None:  # what asks for a dtype will compute
            raise packed_error(self.owner, is_divided(self.words))
        return moved

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWords({self.owner}, device={self.device})"


class CompiledName:
    """What `torch.compile` finds for a packed parameter, where it cannot trace an alias: its place and its dtype alone.

    It is no tensor, so that nothing can be computed with it.
    """

    def __init__(self, words: Tensor, dtype: torch.dtype):
        self.device, self.dtype, self.layout = words.device, dtype, words.layout
        self.is_cpu, self.is_cuda, self.is_meta = words.is_cpu, words.is_cuda, words.is_meta
        self.requires_grad = words.requires_grad


class DenseName:
    """The attribute of a packed module that has the name of a dense parameter."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        words = None if module is None else module._parameters.get(self._name)
        if words is None:
            raise AttributeError(f"{kind.__name__} has no parameter {self._name} yet")
        # On meta there is nothing to protect, and what loads or offloads it compares shapes. Where a forward was
        # interrupted, accelerate finds words that it has put there, and it ties again what it has moved; FSDP finds parts.
        if torch.compiler.is_dynamo_compiling():
            return CompiledName(words, module.dense_dtype)
        if words.is_meta or _asks_who_moves() or _asks_who_ties():
            return words
        alias = local_part(words).detach().as_subclass(PackedWords)
        vars(alias).update(vars(words))  # Transformers marks what is loaded
        alias.owner, alias.dense_dtype, alias.words = f"{kind.__name__}: {self._name}", module.dense_dtype, words
        alias.dense_shape = None
        if isinstance(module, nn.Embedding):
            alias.dense_shape = torch.Size(module.packed_parameters[self._name].shape)
        return alias


def _asks_who_moves() -> bool:
    """Whether accelerate or FSDP, which move parameters around, reads the attribute of whose `__get__` this is called."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith(("accelerate.", "torch.distributed.fsdp."))


def _asks_who_ties() -> bool:
    """Whether Transformers ties weights, which takes a parameter by its name and gives it to another module."""
    caller = sys._getframe(2)
    if caller.f_code is not nn.Module.get_parameter.__code__ or caller.f_back is None:
        return False
    return caller.f_back.f_globals.get("__name__") == "transformers.modeling_utils"


def packed_error(owner: str, divided: bool = False) -> RuntimeError:
    """For code that uses a packed parameter as if it were dense.

    Not a `TypeError`, which the operators of tensors replace by one that says nothing.

    Args:
        owner: its class and name.
        divided: whether this process holds only a part of it. Adapters then ask for its shape, whichever they are.
    """
    if divided:
        return RuntimeError(
            f"{owner} is packed and divided among processes, so other code cannot compute with it, change it or attach to it, "
            "nor can adapters. To train them in several processes, load the model whole into each, without tp_size, attach "
            "them, and use DDP (the Trainer under torchrun) or FSDP2"
        )
    return RuntimeError(
        f"{owner} is packed, so other code cannot compute with it, change it or attach to it. Adapters that only call "
        "linear layers work (LoRA with target_modules=['q_proj', ...]). For others, for merging and for experts, call "
        "dequantize() on the model first (model.get_base_model().dequantize() with PEFT), or load it with dequantize=True"
    )
