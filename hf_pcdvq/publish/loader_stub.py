"""Files that let `from_pretrained(repo, trust_remote_code=True)` load a packed model without `import hf_pcdvq`.

Transformers imports the module named in `auto_map` of config.json before it looks for the quantization method, early
enough to register ours. If the package is missing, Transformers suggests `pip install hf_pcdvq`.

The classes in that module only delegate to the architecture's own. The config class serves whatever asks for the config
first: every auto class, `transformers serve`, lm-eval; the config that it hands back is the architecture's, without
`auto_map`, so that the model loads and is saved like any other. The model class serves those who bring a config that
they loaded without trust. Loading a subclass itself would count as custom code, for which Transformers skips the
renaming of mixture-of-experts weights. Without `trust_remote_code=True`, Transformers ignores `auto_map`.
"""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files.records import write_text
from .architecture import architecture_name

MODULE = "modeling_hf_pcdvq"

_CONFIG = '''\
"""Loads this packed model: from_pretrained(..., trust_remote_code=True).

It does no more than `import hf_pcdvq`, which teaches Transformers the packed format.
"""

import hf_pcdvq  # noqa: F401
from transformers import {imported}


class PackedConfig(PreTrainedConfig):
    """Stands for the config of {architecture}, which is what it loads."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = AutoConfig.from_pretrained(*args, **{{**kwargs, "trust_remote_code": False}})
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # return_unused_kwargs=True
        # What is saved again must not ask for this file, which is not saved with it.
        vars(config).pop("auto_map", None)
        return loaded
'''

_MODEL = '''\


class Packed{architecture}({architecture}):
    """Stands for {architecture}, whose packed form needs no code of its own."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = {architecture}.from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        vars(model.config).pop("auto_map", None)
        return loaded
'''


def add_loader_stub(config: dict, folder: Path) -> None:
    """Write the module into a folder, and refer to it in the config.json there.

    Args:
        config: content of config.json; changed in place.
        folder: contains the files to be published.

    Raises:
        ValueError: the model is not one of Transformers, or already has code of its own, other than this stub.
    """
    architecture = architecture_name(config, folder / "config.json")
    found = None if architecture is None else getattr(transformers, architecture, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"loader stubs are for models of Transformers; this is {architecture}")
    own = config.get("auto_map") or {}
    if not isinstance(own, dict) or any(not str(entry).startswith(f"{MODULE}.") for entry in own.values()):
        raise ValueError(
            f"the model already has code of its own, {config['auto_map']}; add `import hf_pcdvq` to it instead"
        )
    config["auto_map"] = {"AutoConfig": f"{MODULE}.PackedConfig"}
    imported, source = ["AutoConfig", "PreTrainedConfig"], _CONFIG
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        config["auto_map"]["AutoModelForCausalLM"] = f"{MODULE}.Packed{architecture}"
        imported.append(architecture)
        source += _MODEL
    text = source.format(architecture=architecture, imported=", ".join(sorted(imported)))
    write_text(folder / f"{MODULE}.py", text)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
