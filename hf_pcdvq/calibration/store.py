"""Finished decoder blocks on disk, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..modules import dense_weights
from .records import LayerRecord, PackedLayers, QuantizedLayers

_BLOCKS, _WINDOWS = "block-*.safetensors", "windows.safetensors"
_SEPARATOR = "//"  # between the names of module and parameter and the suffix of the tensor, which may be empty


class BlockStore:
    """A folder with one safetensors file per finished block, which holds the fingerprint of the run it belongs to.

    Args:
        folder: created if it does not exist.
        fingerprint: of everything that the result depends on, see `fingerprint`.

    Raises:
        ValueError: the folder holds the blocks of a run with another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder
        self._fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob(_BLOCKS)):
            _check_owner(file, fingerprint)

    def load(self, number: int) -> QuantizedLayers | None:
        """A block's layers, on the CPU; None if it is not finished."""
        file = self._file(number)
        if not file.is_file():
            return None
        packed: PackedLayers = {}
        with safe_open(file, "pt") as content:
            for key in content.keys():
                name, parameter, suffix = key.split(_SEPARATOR)
                packed.setdefault(name, {}).setdefault(parameter, {})[suffix] = content.get_tensor(key)
            records = json.loads(content.metadata()["records"])
        return QuantizedLayers(packed, [LayerRecord(**record) for record in records])

    def save(self, number: int, result: QuantizedLayers) -> None:
        """Keep a finished block."""
        tensors = {
            _SEPARATOR.join((name, parameter, suffix)): tensor.cpu().contiguous()
            for name, layer in result.packed.items()
            for parameter, tensors in layer.items()
            for suffix, tensor in tensors.items()
        }
        records = json.dumps([asdict(record) for record in result.records])
        _save_whole(tensors, self._file(number), {"fingerprint": self._fingerprint, "records": records})

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"


def keep_windows(folder: Path, fingerprint: str, generate: Callable[[], Tensor]) -> Tensor:
    """Windows that a model generates, kept in a folder, from which a resumed run reads them.

    Generating takes long, and an accelerator may not generate the same text again.

    Raises:
        ValueError: the folder holds the windows of another run.
    """
    file = folder / _WINDOWS
    if file.is_file():
        _check_owner(file, fingerprint)
        return load_file(file)["windows"]
    folder.mkdir(parents=True, exist_ok=True)
    windows = generate()
    _save_whole({"windows": windows}, file, {"fingerprint": fingerprint})
    return windows


def clear(folder: Path) -> None:
    """Delete the files of a finished run, and their folder if nothing else is in it."""
    if folder.is_dir():
        for file in [*folder.glob(_BLOCKS), folder / _WINDOWS]:
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_owner(file: Path, fingerprint: str) -> None:
    with safe_open(file, "pt") as content:
        found = (content.metadata() or {}).get("fingerprint")
    if found != fingerprint:
        raise ValueError(
            f"{file} belongs to another run: the model, the settings or the calibration data differ. "
            f"Delete {file.parent} to start over, or choose another folder"
        )


def _save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete."""
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, file)


def fingerprint(model: nn.Module, names: list[str], settings: dict[str, Any], windows: Tensor) -> str:
    """SHA-256 of settings, token ids, and the name, shape and first row of every weight to quantize."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    sha.update(windows.numpy().tobytes())
    for name in names:
        for parameter, weight in dense_weights(model.get_submodule(name)).items():
            sha.update(f"{name}.{parameter} {list(weight.shape)}".encode())
            sha.update(weight[0].detach().double().cpu().numpy().tobytes())
    return sha.hexdigest()
