"""The token embeddings and the output head of a model: which modules they are, whether they can be packed, and how."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import nn

from .modules import PackedModule, embedding_obstacle
from .modules.methods import replace_method
from .modules.tied import owner_of, tied_to
from .select import weight_obstacle
from .weight_readers import read_layers, reads_own_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .codecs import Codec
    from .config import PackedConfig


RESIZE = "resize_token_embeddings"


def vocabulary_settings(model: PreTrainedModel, config: PackedConfig) -> dict[str, str]:
    """The settings that a config asks for, by the names of the modules. Of tied modules, the one that the others are tied to.

    Raises:
        ValueError: there is no such module, or the settings of two that are tied differ.
    """
    asked = {"embeddings": config.embeddings, "head": config.head}
    found: dict[str, str] = {}
    for field, setting in asked.items():
        if setting is None:
            continue
        name = owner_of(model, _name_of(model, field, setting))
        if found.setdefault(name, setting) != setting:
            raise ValueError(
                f"{type(model).__name__} ties its head to its embeddings, so that they have one setting, but embeddings is "
                f"{config.embeddings!r} and head is {config.head!r}. Give both the same, or one of them"
            )
    return found


def check_vocabulary(model: nn.Module, name: str, codec: Codec) -> None:
    """Check that embeddings or an output head, and all that is tied to them, can hold packed weights.

    Args:
        name: of a module that is tied to no other.

    Raises:
        ValueError: they cannot; the message names the module and says why.
    """
    others, read = tied_to(model, name), read_layers(model)
    for module in (name, *others):
        obstacle = read.get(model.get_submodule(module)) or _obstacle(model.get_submodule(module), codec)
        if obstacle is None and others and getattr(model.get_submodule(module), "bias", None) is not None:
            obstacle = "it has a bias beside a tied weight"
        if obstacle:
            tied = f", to which {module} is tied," if module != name else ""
            raise ValueError(f"{name}{tied} cannot be packed as {codec.format}: {module}: {obstacle}")


def refuse_resizing(model: PreTrainedModel) -> None:
    """Have a model whose embeddings or head are packed refuse to resize them, before anything is changed."""
    find = (model.get_input_embeddings, model.get_output_embeddings)
    if any(isinstance(_found(get), PackedModule) for get in find):
        replace_method(model, RESIZE, _refuse_resizing)


def _refuse_resizing(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    embeddings = model.get_input_embeddings()
    asked = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        asked = ceil(asked / pad_to_multiple_of) * pad_to_multiple_of
    if asked == embeddings.num_embeddings:
        return embeddings  # as Transformers does
    raise RuntimeError(
        f"the token embeddings or the output head of {type(model).__name__} are packed and cannot be resized: resize those of "
        "the original and quantize it again, or call dequantize() first"
    )


def _found(get: Callable[[], nn.Module | None]) -> nn.Module | None:
    try:
        return get()
    except NotImplementedError:
        return None


def _name_of(model: PreTrainedModel, field: str, setting: str) -> str:
    module = _found({"embeddings": model.get_input_embeddings, "head": model.get_output_embeddings}[field])
    names = [name for name, part in model.named_modules() if part is module]
    if not names:
        what = {"embeddings": "token embeddings", "head": "output head"}[field]
        raise ValueError(f"{field}={setting!r}: {type(model).__name__} has no {what} that Transformers knows of")
    return names[0]


def _obstacle(module: nn.Module, codec: Codec) -> str | None:
    """Why a module cannot be packed, or None if it can."""
    if isinstance(module, nn.Embedding):
        obstacle = embedding_obstacle(module)
        if codec.row_multiple != 1:
            obstacle = "rows of this format cannot be decoded one by one; those of 'int8' can"
        elif reads_own_weight(module):
            obstacle = f"{type(module).__name__} computes with its weight itself"
    elif type(module) is nn.Linear:
        obstacle = None
    else:
        obstacle = f"{type(module).__name__} is neither nn.Linear nor nn.Embedding"
    return obstacle or weight_obstacle(module.weight, codec)
