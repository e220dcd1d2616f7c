"""Whether a repository on the Hub contains a version of the model to be pushed, or another model."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelInfo

from ..config import CONFIGS
from ..files.scratch import scratch_folder

# Weight files of any library.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}


def refuse_other_model(api: HfApi, info: ModelInfo, folder: Path, card: ModelCard) -> None:
    """Refuse to replace a model that is not an older version of the one in `folder`.

    Versions of a model share its architecture, sizes, original, packed format and bits. They may have been calibrated
    differently, or saved by different versions of hf_pcdvq.

    Args:
        info: the repository, at the revision to be changed.
        folder: the model to be pushed.
        card: its card.

    Raises:
        ValueError: the repository contains another model; the message says what differs.
    """
    names = [file.rfilename for file in info.siblings or []]
    if not any(PurePosixPath(name).suffix in _WEIGHTS for name in names):
        return
    if "config.json" not in names:
        difference = "weights without a config.json"
    else:
        with scratch_folder() as cache:
            there = _read(api.hf_hub_download(info.id, "config.json", revision=info.sha, cache_dir=cache))
        difference = _difference(there, _read(folder / "config.json")) or _other_original(info, card)
    if difference:
        raise ValueError(
            f"{info.id} contains another model ({difference}). Push to another repository or revision, or use --force "
            "(force=True) to replace it"
        )


def _read(file: str | Path) -> dict[str, Any]:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first difference that makes two configs those of different models."""
    for name in ("model_type", "architectures"):
        if there.get(name) != here.get(name):
            return f"{name} {there.get(name)}, here {here.get(name)}"
    packed_there, packed_here = there.get("quantization_config"), here["quantization_config"]
    if packed_there is None:
        return "one that is not quantized"
    # Fields that users choose a repository by.
    for name in ("quant_method", *CONFIGS[packed_here["quant_method"]].format_fields):
        if packed_there.get(name) != packed_here.get(name):
            return f"{name} {packed_there.get(name)}, here {packed_here.get(name)}"
    return _other_size(there, here)


def _other_size(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first integer field, nested ones such as text_config included, that is in both configs but differs."""
    for name in sorted(there.keys() & here.keys()):
        if name.endswith("_token_id"):
            continue
        values = there[name], here[name]
        if all(isinstance(value, dict) for value in values) and name != "quantization_config":
            inner = _other_size(*values)
            if inner:
                return f"{name}.{inner}"
        elif all(type(value) is int for value in values) and values[0] != values[1]:
            return f"{name} {values[0]}, here {values[1]}"
    return None


def _other_original(info: ModelInfo, card: ModelCard) -> str | None:
    there = info.card_data.get("base_model") if info.card_data else None
    here = card.data.get("base_model")
    if there is None or here is None or _names(there) == _names(here):
        return None
    return f"made from {there}, here from {here}"


def _names(base_model: str | list[str]) -> list[str]:
    return [base_model] if isinstance(base_model, str) else sorted(base_model)
