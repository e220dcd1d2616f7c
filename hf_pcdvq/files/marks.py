"""Two fields of config.json that say how a packed model wants to be loaded; see `publish.loader_stub`, which writes them.

Neither belongs to the model: they are dropped as soon as it loads, because what is saved again has no such module.
"""

from __future__ import annotations

from typing import Any

MODULE = "modeling_hf_pcdvq"  # of the loader stub
# The name of the file with the weights, to Transformers, which refuses one that is not of safetensors and quotes it.
# Without the plugin that ends every attempt to load the model, also with `ignore_mismatched_sizes=True`, which would
# fill the packed layers with random weights. The plugin drops it before the name is used.
WEIGHTS = "packed with hf_pcdvq: `pip install hf_pcdvq`, then `import hf_pcdvq` before loading"


def is_ours(auto_map: Any) -> bool:
    """Whether an `auto_map` names classes of the loader stub and nothing else."""
    return isinstance(auto_map, dict) and all(
        str(entry).rpartition("--")[2].startswith(f"{MODULE}.") for entry in auto_map.values()
    )


def drop_marks(fields: dict[str, Any]) -> None:
    """Remove both from the fields of a config, if they are there."""
    if fields.get("transformers_weights") == WEIGHTS:
        del fields["transformers_weights"]
    if "auto_map" in fields and is_ours(fields["auto_map"]):
        del fields["auto_map"]
