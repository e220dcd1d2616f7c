"""The class that a config.json names. It is a name from a file: nothing but a model of Transformers is ever called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


def architecture_name(settings: dict[str, Any], file: Path) -> str | None:
    """The class of a saved model, from the content of its config.json, `file`; None if that names none.

    Raises:
        ValueError: `architectures` is not a list of names.
    """
    names = settings.get("architectures")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"{file}: architectures must be a list of names, got {names!r:.80}")
    return names[0] if names else None


def architecture_of(config: PreTrainedConfig, file: Path) -> type[PreTrainedModel] | None:
    """The class in Transformers that a config, read from `file`, names; None if Transformers has nothing by that name.

    Raises:
        ValueError: what Transformers has by that name is not a model, or a model with another kind of config.
    """
    name = architecture_name({"architectures": config.architectures}, file)
    found: Any = None if name is None else getattr(transformers, name, None)
    if found is None:
        return None
    config_class: Any = getattr(found, "config_class", None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or config_class is None:
        raise ValueError(f"{file}: architectures names {name}, which is not a model of Transformers")
    if not isinstance(config, config_class):
        raise ValueError(
            f"{file}: architectures names {name}, which takes a {config_class.__name__}, but model_type "
            f"{config.model_type!r} is a {type(config).__name__}"
        )
    return found
