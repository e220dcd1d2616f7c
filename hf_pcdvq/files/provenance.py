"""The origin of a packed model: `provenance.json`, written when a model is quantized, read for its model card."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .fields import short_text, short_texts
from .records import known_fields, read_json, write_text

NAME = "provenance.json"
_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")
# Metadata that a quantized model inherits. The rest of a card describes the original itself.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Provenance:
    """How a packed model was made.

    Attributes:
        original: name of the dense model on the Hub; None if it was a local folder, or is unknown.
        revision: commit of the original on the Hub; None for a folder.
        command: the command line; None if the model was quantized from Python.
        versions: versions of the packages involved.
        inherited: licence and language from the original's model card.
    """

    original: str | None = None
    revision: str | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    inherited: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Read the provenance of a saved model; empty if the folder has none.

        Raises:
            ValueError: the file is damaged, was written by a newer version, or holds what no quantization writes; the
                message names the field.
        """
        file = folder / NAME
        return read_json(file, cls._parse) if file.is_file() else cls()

    @classmethod
    def _parse(cls, content: Any) -> Provenance:
        known = known_fields(cls, content, _FORMAT)
        for name, pattern in (("original", _HUB_ID), ("revision", _REVISION)):
            if known[name] is not None and not pattern.fullmatch(short_text(name, known[name], 200)):
                raise ValueError(f"{name} must be a name on the Hub, got {known[name]!r}")
        if known["command"] is not None:
            short_text("command", known["command"], 10_000)
        short_texts("versions", known["versions"])
        inherited = known["inherited"]
        if not isinstance(inherited, dict) or not inherited.keys() <= set(_INHERITED):
            raise ValueError(f"inherited must be an object with {', '.join(_INHERITED)} at most")
        for name, value in inherited.items():
            for text in value if isinstance(value, list) else [value]:
                short_text(f"inherited.{name}", text)
        return cls(**known)

    def write(self, folder: Path) -> None:
        """Write `provenance.json` beside a saved model."""
        write_text(folder / NAME, json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")


def hub_name(model: str | None) -> str | None:
    """The name of a model on the Hub, or None for a local folder."""
    if model is None or Path(model).is_dir() or not _HUB_ID.fullmatch(model):
        return None
    return model


def inherited_metadata(original: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """Licence and language from a model's card; empty if there is no card, or none is available offline.

    Args:
        original: a folder, or the name of a model on the Hub.
        revision: branch, tag or commit on the Hub.
        token: access token for the Hub; None takes the stored one.
    """
    file = Path(original) / "README.md"
    if not Path(original).is_dir():
        try:
            file = Path(hf_hub_download(original, "README.md", revision=revision, token=token))
        except EntryNotFoundError:
            return {}
    if not file.is_file():
        return {}
    data = ModelCard.load(file, ignore_metadata_errors=True).data
    return {name: data.get(name) for name in _INHERITED if data.get(name) is not None}
