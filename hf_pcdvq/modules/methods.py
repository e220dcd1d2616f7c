"""Methods of Transformers' models that packed tensors mislead, replaced in single models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .packed import PackedModule


class MethodOf:
    """A function as a method of one model, which it does not keep alive; copied and pickled with the model."""

    def __init__(self, function: Callable, model: nn.Module):
        self._function, self._model = function, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodOf:
        return MethodOf(self._function, memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> tuple[type[MethodOf], tuple[Callable, nn.Module]]:
        return MethodOf, (self._function, self._model())


def replace_method(model: nn.Module, name: str, function: Callable | None) -> None:
    """Have a model, and every model of Transformers in it, use a function as a method; None for their own one again."""
    from transformers import PreTrainedModel  # not when this package is imported: it takes seconds

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop(name, None)
            if function is not None:
                part.__dict__[name] = MethodOf(function, part)


def parameters_dense_first(model: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """`parameters()` with the scales and levels of packed modules last.

    Transformers takes the dtype of the first floating one for that of the model. With packed embeddings it would be that of
    their scales. The device it takes from the first one, so packed words, which are integers, keep their place.
    """
    seen, last = set(), []
    for module in model.modules() if recurse else [model]:
        entries = module.packed_parameters.values() if isinstance(module, PackedModule) else ()
        packed = {name for entry in entries for name in entry.tensors.values()}
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in seen:
                continue
            seen.add(parameter)
            if name in packed and parameter.is_floating_point():
                last.append(parameter)
            else:
                yield parameter
    yield from last
