"""Two fields of config.json that say how a packed model wants to be loaded; see `publish.loader_stub`, which writes them.

Neither belongs to the model: they are dropped as soon as it loads, because what is saved again has no such module.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..version import INSTALL

MODULE = "modeling_hf_pcdvq"  # of the loader stub
# The name of the file with the weights, to Transformers, which refuses one that is not of safetensors and quotes it.
# Without the plugin that ends every attempt to load the model, also with `ignore_mismatched_sizes=True`, which would
# fill the packed layers with random weights. The plugin drops it before the name is used.
_BEGINNING = "packed with hf_pcdvq: "  # what follows may change
WEIGHTS = f"{_BEGINNING}{INSTALL}, then `import hf_pcdvq` before loading"


def add_weights_mark(fields: dict[str, Any]) -> None:
    """Write `transformers_weights` into the content of a config.json, and into the configs of parts of the model in it.

    Some classes take such a part for their config: the causal language model of one that reads images, for example.
    """
    fields["transformers_weights"] = WEIGHTS
    for part in _parts(fields):
        add_weights_mark(part)


def foreign_code(auto_map: dict[str, Any]) -> dict[str, Any]:
    """The entries of an `auto_map` that name other code than the loader stub."""
    return {
        name: code
        for name, code in auto_map.items()
        if not str(code).rpartition("--")[2].startswith(f"{MODULE}.")  # a repository may stand before it
    }


def drop_marks(fields: dict[str, Any]) -> None:
    """Remove both from the fields of a config, if they are there, and from the configs of its parts."""
    if str(fields.get("transformers_weights")).startswith(_BEGINNING):
        del fields["transformers_weights"]
    if isinstance(fields.get("auto_map"), dict):
        others = foreign_code(fields["auto_map"])
        if others:
            fields["auto_map"] = others
        else:
            del fields["auto_map"]
    for part in _parts(fields):
        drop_marks(part)


def _parts(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of the configs in a config; in a file these are dictionaries."""
    objects = [vars(value) for value in fields.values() if isinstance(value, PreTrainedConfig)]
    return objects + [value for value in fields.values() if isinstance(value, dict) and "model_type" in value]
