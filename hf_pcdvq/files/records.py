"""Shared by the records that are saved beside a model: package versions, device names, formats, atomic writes."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from ..version import INSTALL, __version__
from .scratch import scratch_folder

Record = TypeVar("Record")


def package_versions() -> dict[str, str]:
    """Versions of the packages that every packed model runs on."""
    return {"hf_pcdvq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device: torch.device) -> str:
    """The product name of a device; for a CPU with the number of threads, on which its speed depends."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"a CPU ({cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")  # Linux
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def known_fields(kind: type, content: Any, version: int) -> dict[str, Any]:
    """The fields of the dataclass `kind` in a record. Others, which a later version may have added, are ignored.

    Raises:
        ValueError: the format of the record is not `version`, or a field is missing.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != version:
        raise ValueError(
            f"expected a record of format {version}, found format {found}; create it again, or upgrade: "
            f"{INSTALL}, once that is updated"
        )
    missing = [field.name for field in fields(kind) if field.name not in content]
    if missing:
        raise ValueError(f"the record is incomplete, it lacks {', '.join(missing)}; create it again")
    return {field.name: content[field.name] for field in fields(kind)}


def read_json(file: Path, parse: Callable[[Any], Record]) -> Record:
    """Read a JSON file and return what `parse` makes of its content.

    Raises:
        ValueError: the file is damaged, or `parse` raised a ValueError; the message names the file.
    """
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        ValueError: the file is damaged, or holds something else; the message names it.
    """

    def parse(content: Any) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
        return content

    return read_json(file, parse)


def write_text(file: Path, text: str) -> None:
    """Write a file atomically, with Unix line ends.

    Raises:
        OSError: the file cannot be written; the message names it, which the one for a full disk would not.
    """
    try:
        with scratch_folder(file.parent) as folder:
            partial = folder / file.name
            partial.write_text(text, encoding="utf-8", newline="\n")
            partial.replace(file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error
