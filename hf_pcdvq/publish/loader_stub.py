"""Files that let `from_pretrained(repo, trust_remote_code=True)` load a packed model without `import hf_pcdvq`.

Transformers imports the module named in `auto_map` of config.json before it looks for the quantization method, early
enough to register ours. If the package is missing, Transformers suggests `pip install hf_pcdvq`.

The class in that module only delegates to the architecture's. Loading the subclass itself would count as custom code,
for which Transformers skips the renaming of mixture-of-experts weights; and with the architecture's own class in
`auto_map`, the model could not be saved again. Without `trust_remote_code=True`, Transformers ignores `auto_map`.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files.records import write_text
from .architecture import architecture_name

MODULE = "modeling_hf_pcdvq"
_AUTO_CLASS = "AutoModelForCausalLM"

_SOURCE = '''\
"""Loads this packed model: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).

It does no more than `import hf_pcdvq`, which teaches Transformers the packed format.
"""

import hf_pcdvq  # noqa: F401
from transformers import {architecture}


class Packed{architecture}({architecture}):
    """Stands for {architecture}, whose packed form needs no code of its own."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = {architecture}.from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        # Saved again, the model must not ask for this file, which is not saved with it.
        vars(model.config).pop("auto_map", None)
        return loaded
'''


def add_loader_stub(config: dict, folder: Path) -> None:
    """Write the module into a folder, and refer to it in the config.json there.

    Args:
        config: content of config.json; changed in place.
        folder: contains the files to be published.

    Raises:
        ValueError: the model is not a causal language model of Transformers, or already has code of its own.
    """
    architecture = architecture_name(config)
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"loader stubs are for causal language models of Transformers; this is {architecture}")
    if "auto_map" in config:
        raise ValueError(
            f"the model already has code of its own, {config['auto_map']}; add `import hf_pcdvq` to it instead"
        )
    config["auto_map"] = {_AUTO_CLASS: f"{MODULE}.Packed{architecture}"}
    write_text(folder / f"{MODULE}.py", _SOURCE.format(architecture=architecture))
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
