"""Files that let `from_pretrained(repo, trust_remote_code=True)` load a packed model without `import hf_pcdvq`.

Transformers imports the module named in `auto_map` of config.json before it looks for the quantization method, early
enough to register ours. If the package is missing, the module says how to install it: Transformers, which looks for
imports outside of `try`, would suggest to take from PyPI whatever has its name there.

The classes in that module only delegate to the architecture's own. The config class serves whatever asks for the config
first: every auto class, `transformers serve`, lm-eval; the config that it hands back is the architecture's, without
reference to the module, so that the model loads and is saved like any other. The model class serves those who bring a config that
they loaded without trust. Loading a subclass itself would count as custom code, for which Transformers skips the
renaming of mixture-of-experts weights.

Without `trust_remote_code=True`, Transformers ignores `auto_map`. Those who have neither that nor the plugin get an error
of one line that says what is missing, by the other field that is written here, see `files.marks`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files.marks import MODULE, add_weights_mark, drop_marks, foreign_code
from ..files.records import read_object, write_text
from ..version import INSTALL
from .architecture import architecture_name

_CONFIG = '''\
"""Loads this packed model: from_pretrained(..., trust_remote_code=True).

It does no more than `import hf_pcdvq`, which teaches Transformers the packed format.
"""

from transformers import {imported}

try:
    import hf_pcdvq  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"this model is packed with hf_pcdvq, which cannot be imported ({{error}}) and is not on PyPI: {install}"
    ) from error


class PackedConfig(PreTrainedConfig):
    """Stands for the config of {architecture}, which is what it loads."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = AutoConfig.from_pretrained(*args, **{{**kwargs, "trust_remote_code": False}})
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # return_unused_kwargs=True
        # Without what names this file, or Transformers would look for the model's class here too.
        auto_map = vars(config).pop("auto_map", {{}})
        others = {{name: code for name, code in auto_map.items() if "{module}." not in str(code)}}
        if others:
            config.auto_map = others
        return loaded
'''

_MODEL = '''\


class Packed{architecture}({architecture}):
    """Stands for {architecture}, whose packed form needs no code of its own."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return {architecture}.from_pretrained(*args, **kwargs)
'''


def add_loader_stub(folder: Path) -> str | None:
    """Write the module into the folder of a packed model, and refer to it in the config.json there.

    A model whose class is not in Transformers, or whose `auto_map` names other code for the model or its config, gets no
    module, and keeps its `auto_map`; its config.json still makes loading without the plugin fail in one line. Code for a
    tokenizer or processor stays beside the module.

    Args:
        folder: contains the model as `save_pretrained` wrote it; links in it are replaced, not followed.

    Returns:
        Why there is no module; None if there is one.

    Raises:
        ValueError: config.json is damaged.
        OSError: the files cannot be written.
    """
    file = folder / "config.json"
    config = read_object(file)
    add_weights_mark(config)
    architecture = architecture_name(config, file)
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise ValueError(f"{file}: auto_map must be an object, got {auto_map!r:.100}")
    others = foreign_code(auto_map)
    obstacle = _obstacle(others, architecture)
    if obstacle is None:
        config["auto_map"] = {**others, "AutoConfig": f"{MODULE}.PackedConfig"}
        imported, source = ["AutoConfig", "PreTrainedConfig"], _CONFIG
        if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            config["auto_map"]["AutoModelForCausalLM"] = f"{MODULE}.Packed{architecture}"
            imported.append(architecture)
            source += _MODEL
        text = source.format(
            architecture=architecture, imported=", ".join(sorted(imported)), module=MODULE, install=INSTALL
        )
        write_text(folder / f"{MODULE}.py", text)
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return obstacle


def remove_loader_stub(folder: Path) -> None:
    """Undo `add_loader_stub`, if it was called for this folder. Raises the same errors."""
    file = folder / "config.json"
    config, before = read_object(file), read_object(file)
    drop_marks(config)
    if config != before:
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / f"{MODULE}.py").unlink(missing_ok=True)


def _obstacle(others: dict[str, Any], architecture: str | None) -> str | None:
    """Why a model with this other code in its `auto_map` gets no module."""
    found = None if architecture is None else getattr(transformers, architecture, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return f"no loader stub: it is for models of Transformers, and this is {architecture}"
    for name, code in others.items():
        if name == "AutoConfig" or name.startswith("AutoModel"):
            return (
                f"no loader stub: the model has code of its own ({name}: {code!s:.100}), which is kept; add `import hf_pcdvq` "
                f"to that, or delete auto_map from config.json if {architecture} of Transformers is to load the model"
            )
    return None
