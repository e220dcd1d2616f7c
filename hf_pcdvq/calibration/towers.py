"""What a model has for other inputs than text, such as a tower for images: calibration, which runs text, leaves it alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from torch import nn

from .blocks import embeddings_name, find_blocks

# Arguments of forward passes. What models declare as their `input_modalities` is often inherited, and not theirs.
_OTHER_INPUTS = re.compile(r"pixel|image|video|audio|speech|protein|features|input_values")


def not_reached_by_text(model: nn.Module, layers: list[str], asked: Callable[[str], bool]) -> dict[str, str]:
    """What a model has for other inputs than text, such as a tower for images and its projector.

    These are the modules beside the language model, which is the smallest module that holds the input embeddings and the
    decoder blocks, and the models of their own in it that hold neither. A model that takes text alone has none: all of its
    parts are there for text, whether they are in the list of blocks or not.

    Args:
        layers: names of those that could be packed.
        asked: whether the user asks for a layer, by its name.

    Returns:
        Reasons not to pack the modules that hold some of them, by name: of a module in which some layers are asked for,
        those of the other layers.

    Raises:
        As `find_blocks`.
    """
    from transformers import PreTrainedModel  # not when this package is imported: it takes seconds

    blocks, embeddings, head = find_blocks(model, layers), embeddings_name(model), model.get_output_embeddings()
    around = [name for name, _ in model.named_modules() if _holds(name, blocks)]
    if not any(_takes_more_than_text(model.get_submodule(name)) for name in around):
        return {}
    language = max((name for name in around if _holds(name, embeddings)), key=len)
    found: list[str] = []
    for name, module in model.named_modules():
        if module is head or name in around or any(_holds(part, name) for part in (*found, blocks)):
            continue
        own = isinstance(module, PreTrainedModel) and not _holds(name, embeddings)
        if (own or not _holds(language, name)) and any(_holds(name, layer) for layer in layers):
            found.append(name)
    left: list[str] = []
    for name in found:
        inside = [layer for layer in layers if _holds(name, layer)]
        others = [layer for layer in inside if not asked(layer)]
        left += [name] if others == inside else others
    return dict.fromkeys(left, "calibration runs text, which does not reach it")


def _takes_more_than_text(module: nn.Module) -> bool:
    return any(_OTHER_INPUTS.search(name) for name in inspect.signature(module.forward).parameters)


def _holds(module: str, *names: str) -> bool:
    """Whether modules are this one, or in it, by their names."""
    return not module or all(f"{name}.".startswith(f"{module}.") for name in names)
