"""What the records beside a model share: versions, the name of a device, their format, files that appear whole or not at
all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from ..version import __version__

Record = TypeVar("Record")


def package_versions() -> dict[str, str]:
    """Versions of what every packed model is computed with."""
    return {"hf_pcdvq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device: torch.device) -> str:
    """What its maker calls it; of a CPU with the number of threads, since speed depends on it."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"a CPU ({_cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")  # Linux
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def known_fields(kind: type, content: Any, version: int) -> dict[str, Any]:
    """The fields of a dataclass, out of a record; others, which a later version has added, are passed over.

    Raises:
        ValueError: the record is of another format, or lacks a field.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != version:
        raise ValueError(
            f"expected a record of format {version}, found format {found}; make it anew, or upgrade: "
            "pip install -U hf_pcdvq"
        )
    missing = [field.name for field in fields(kind) if field.name not in content]
    if missing:
        raise ValueError(f"not a whole record, it lacks {', '.join(missing)}; make it anew")
    return {field.name: content[field.name] for field in fields(kind)}


def read_json(file: Path, parse: Callable[[Any], Record]) -> Record:
    """What `parse` makes of the contents of a JSON file.

    Raises:
        ValueError: the file is damaged, or `parse` has raised; the message names the file.
    """
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written; the message names it, which that of a full disk does not do by itself.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
