"""Modules whose weights a model ties to that of another: token embeddings and output heads, mostly.

One of them, the owner, is packed; the others hold the same packed tensors. Transformers ties parameters by name, so the
names of the packed tensors join those of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .embedding import QuantEmbedding
from .methods import parameters_dense_first, replace_method
from .packed import PackedModule

_KEYS = "all_tied_weights_keys"


def owner_of(model: nn.Module, name: str) -> str:
    """The module whose weight a module's is tied to; itself if that is none."""
    source = getattr(model, _KEYS, {}).get(f"{name}.weight", f"{name}.weight")
    return source.removesuffix(".weight")


def tied_to(model: nn.Module, name: str) -> list[str]:
    """The modules whose weight is tied to that of a module."""
    keys = getattr(model, _KEYS, {}).items()
    return [target.removesuffix(".weight") for target, source in keys if source == f"{name}.weight"]


def is_tied(model: nn.Module, name: str) -> bool:
    """Whether a module, by its name, holds the packed tensors of another."""
    return f"{name}.weight" in getattr(model, _KEYS, {})


def install(model: nn.Module, name: str, packed: PackedModule) -> None:
    """Put a packed module in the place of a dense one, and packed ones in those of modules that are tied to it.

    These have the same tensors if the dense ones had the same. Otherwise the model is yet to be loaded, and Transformers
    will tie them.
    """
    from . import packed_type  # which imports the modules first

    others, weight = tied_to(model, name), getattr(model.get_submodule(name), "weight", None)
    shared = all(model.get_submodule(other).weight is weight for other in others)
    model.set_submodule(name, packed)
    for other in others:
        dense = model.get_submodule(other)
        tied = packed_type(dense).empty_like(dense, packed.codec)
        tied._is_hf_initialized = getattr(packed, "_is_hf_initialized", False)
        if getattr(dense, "bias", None) is not None:
            tied.bias = dense.bias
        model.set_submodule(other, tied.train(dense.training))
    _tie_names(model, name)
    if shared:
        share(model, name)
    if _has_embeddings(model, name):
        replace_method(model, "parameters", parameters_dense_first)


def share(model: nn.Module, name: str) -> None:
    """Give modules that are tied to a packed one its tensors."""
    packed = model.get_submodule(name)
    for other in tied_to(model, name):
        tied = model.get_submodule(other)
        tied._parameters.update({key: packed._parameters[key] for key in _tensors(packed)})
        tied.reset_tables()


def tie_dense(model: nn.Module, layers: dict[str, PackedModule]) -> None:
    """Tie modules that have become dense again as the packed ones, by name, that they were.

    A checkpoint may have two weights where the model ties one to the other. Transformers then keeps those packed tensors
    apart that differ, and ties the rest: such modules have weights of their own.
    """
    for name, layer in layers.items():
        for other in tied_to(model, name):
            if _same(layer, layers[other]):
                model.get_submodule(other).weight = model.get_submodule(name).weight


def uninstall(model: nn.Module, name: str) -> None:
    """Undo what `install` has done besides replacing modules, before a packed module becomes dense again."""
    if _has_embeddings(model, name):
        replace_method(model, "parameters", None)
    for part, names in _declared(model, name):
        for target in names:
            getattr(part, _KEYS).pop(target, None)  # Transformers forgets those that differ
        declared = getattr(part, "_tied_weights_keys", None) or {}
        if names.keys() & declared.keys():
            part._tied_weights_keys = {key: value for key, value in declared.items() if key not in names}


def _tie_names(model: nn.Module, name: str) -> None:
    """Tie, beside the weight, the other packed tensors, in the model and in the models inside it that declare it."""
    for part, names in _declared(model, name):
        getattr(part, _KEYS).update(names)
        if getattr(part, "_tied_weights_keys", None):
            part._tied_weights_keys = {**part._tied_weights_keys, **names}


def _declared(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Models inside a model that know that weights are tied to that of a packed module, with the names, as they know them,
    of its other packed tensors."""
    others = [key for key in _tensors(model.get_submodule(name)) if key != "weight"]
    for path, part in model.named_modules():
        prefix, keys = path and f"{path}.", getattr(part, _KEYS, None)
        if not keys or not name.startswith(prefix):
            continue
        owner = name.removeprefix(prefix)
        targets = [target.removesuffix("weight") for target, source in keys.items() if source == f"{owner}.weight"]
        names = {f"{target}{key}": f"{owner}.{key}" for target in targets for key in others}
        if names:
            yield part, names


def _has_embeddings(model: nn.Module, name: str) -> bool:
    """Whether a packed module, or one that is tied to it, is an embedding."""
    return any(isinstance(model.get_submodule(one), QuantEmbedding) for one in (name, *tied_to(model, name)))


def _same(packed: PackedModule, other: PackedModule) -> bool:
    """Whether two packed modules hold the same packed tensors."""
    return all(packed._parameters[key] is other._parameters[key] for key in _tensors(packed))


def _tensors(packed: PackedModule) -> list[str]:
    """The names of the packed tensors that may be tied; of fused experts, none."""
    entry = packed.packed_parameters.get("weight")
    return [] if entry is None else list(entry.tensors.values())
