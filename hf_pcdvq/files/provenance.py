"""The origin of a packed model: `provenance.json`, written when a model is quantized or recovered, read for its model card."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .fields import number, positive_integer, short_text, short_texts
from .records import known_fields, read_json, write_text

NAME = "provenance.json"
_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")
_LEAST = -1e-6  # a divergence of 0 may be rounded to less
# Metadata that a quantized model inherits. The rest of a card describes the original itself.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Recovered:
    """How a packed model was trained after it was quantized.

    Attributes:
        teacher: name of the original on the Hub that it was trained towards; None if it was a local folder.
        text, held_out: what it was trained and judged on, in words.
        windows, length: number of windows that were trained on, and tokens per window.
        held_out_windows, held_out_length: those that it was judged on.
        steps, best_step: steps that were done, and the one whose result was kept; 0 if the model is unchanged.
        batch, learning_rate: windows per step, and the largest rate.
        seconds, device: duration, and where.
        perplexity_original, perplexity_before, perplexity_after: on the held-out text.
        kl_before, kl_after: mean KL(original || packed) there, in nats.
        command: the command line; None if the model was recovered from Python.
    """

    teacher: str | None
    text: str
    held_out: str
    windows: int
    length: int
    held_out_windows: int
    held_out_length: int
    steps: int
    best_step: int
    batch: int
    learning_rate: float
    seconds: float
    device: str
    perplexity_original: float
    perplexity_before: float
    perplexity_after: float
    kl_before: float
    kl_after: float
    command: str | None = None

    @classmethod
    def of(cls, content: Any) -> Recovered | None:
        """From a record; None if there is none.

        Raises:
            ValueError: a field is missing or has another type; the message names it.
        """
        if content is None:
            return None
        if not isinstance(content, dict) or {field.name for field in fields(cls)} - content.keys():
            raise ValueError(f"recovery must be an object with {', '.join(field.name for field in fields(cls))}")
        known = {field.name: content[field.name] for field in fields(cls)}
        for name, value in known.items():
            where = f"recovery.{name}"
            if value is None and name in ("teacher", "command"):
                continue
            if name in ("teacher", "text", "held_out", "device", "command"):
                short_text(where, value, 10_000 if name == "command" else 500)
            elif name in ("windows", "length", "held_out_windows", "held_out_length", "steps", "batch"):
                positive_integer(where, value)
            elif not math.isfinite(number(where, value)) or value < _LEAST:
                raise ValueError(f"{where} must be finite and not negative, got {value!r}")
        return cls(**known)

    @property
    def over_adapted(self) -> bool:
        """Whether training has made the model predict the held-out text better than its original, which it was to
        imitate."""
        return self.best_step > 0 and self.perplexity_after < self.perplexity_original


@dataclass(frozen=True)
class Provenance:
    """How a packed model was made.

    Attributes:
        original: name of the dense model on the Hub; None if it was a local folder, or is unknown.
        revision: commit of the original on the Hub; None for a folder.
        command: the command line; None if the model was quantized from Python.
        versions: versions of the packages involved.
        inherited: licence and language from the original's model card.
        recovery: how it was trained afterwards; None if it was not.
    """

    original: str | None = None
    revision: str | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    inherited: dict[str, Any] = field(default_factory=dict)
    recovery: Recovered | None = None

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
        known["recovery"] = Recovered.of(known["recovery"])
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
