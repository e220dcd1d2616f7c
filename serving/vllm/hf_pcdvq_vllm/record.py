"""What the safetensors files of a packed model say of themselves (docs/formats.md, "The record in the files").

Hashes of tensors are not compared here: `hf-pcdvq check FOLDER` does that. Does not import vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .coding import Coding, check_codebook

KEY = "hf_pcdvq"
FORMAT_VERSION = 1
_FILE = "model.safetensors"  # and its index, of a model in several files


def read_codings(model: str, revision: str | None, settings: dict[str, Any]) -> dict[str, Coding]:
    """The codings of all packed modules, by name.

    Args:
        model: a folder, or a name on the Hub.
        revision: on the Hub.
        settings: the `quantization_config` of config.json.

    Raises:
        ValueError: there is no record, it is damaged or from a newer version, or it contradicts config.json.
        NotImplementedError: the embeddings or the output head are packed.
    """
    _refuse_vocabulary(model, settings)
    found: dict[str, Any] | None = None
    for file, metadata in sorted(_metadata(model, revision).items()):
        record = _parsed(f"{model}: {file}", (metadata or {}).get(KEY))
        if found is not None and any(record[part] != found[part] for part in ("codecs", "settings")):
            raise ValueError(f"{model}: {file} is of another model than the files before it")
        found = record
    if found is None:
        raise ValueError(f"{model} holds no safetensors files, which packed models are in")
    _compare(model, found["settings"], settings)
    codings: dict[str, Coding] = {}
    for entry in found["codecs"]:
        try:
            description, names = entry
            coding = Coding.described(description)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{model}: the record of its files describes no codec: {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{model}: the record of its files names no modules: {names!r:.200}")
        for name in names:
            if codings.setdefault(name, coding) != coding:
                raise ValueError(
                    f"{model}: the record of its files packs {name} both in {codings[name].format} and in {coding.format}"
                )
    return codings


def _refuse_vocabulary(model: str, settings: dict[str, Any]) -> None:
    packed = [
        f"{field}={settings[field]!r:.100}" for field in ("embeddings", "head") if settings.get(field) is not None
    ]
    if packed:
        raise NotImplementedError(
            f"{model} was quantized with {' and '.join(packed)}: in vLLM, embeddings and the output head are its own and cannot "
            "be packed. Quantize the model again without these options, or run it with Transformers: hf-pcdvq serve"
        )


def _metadata(model: str, revision: str | None) -> dict[str, dict[str, str] | None]:
    """The metadata in the headers of the files that hold the model's weights, by file."""
    if Path(model).is_dir():
        found = {}
        for name in _files(Path(model)):
            with safe_open(Path(model) / name, framework="pt") as opened:
                found[name] = opened.metadata()
        return found
    from huggingface_hub import get_safetensors_metadata

    described = get_safetensors_metadata(model, revision=revision)
    return {name: file.metadata for name, file in described.files_metadata.items()}


def _files(folder: Path) -> list[str]:
    """The files of a folder that hold the model's weights: others may lie beside them, such as adapters.

    Raises:
        ValueError: the index is damaged, or one of its files is missing.
    """
    index = folder / f"{_FILE}.index.json"
    if (folder / _FILE).is_file():
        return [_FILE]
    if not index.is_file():
        return []
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names the file {name!r:.200}, which is not in its folder")
    return names


def _parsed(where: str, text: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError(
            f"{where} does not say how its modules are packed: another program has written it. Load the model with hf_pcdvq "
            "and save it again"
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: the record in its metadata is damaged: {error}") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int or version > FORMAT_VERSION:
        raise ValueError(f"{where}: format_version {version!r:.100} is not one that this plugin reads; upgrade it")
    if not isinstance(record.get("codecs"), list) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{where}: the record in its metadata is not complete")
    return record


def _compare(model: str, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    for field, value in recorded.items():
        if settings.get(field) != value:
            raise ValueError(
                f"{model}: config.json says {field} {settings.get(field)!r:.100}, its files say {value!r:.100}; "
                "they do not belong together"
            )
    if "codebook_sha256" in recorded:
        if not isinstance(recorded.get("codebook"), str):
            raise ValueError(f"{model}: its files name no codebook, but {recorded.get('codebook')!r:.100}")
        check_codebook(recorded["codebook"], recorded["codebook_sha256"])
