"""Finished decoder blocks on disk, so that an interrupted run can resume.

Every file records the identity of the run that it belongs to and a checksum of its contents. One that does not fit is
never used: it is named and refused, or, if the caller asks for that, deleted and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .identity import Identity, differences, update_with_tensor
from .records import LayerRecord, QuantizedLayers

logger = logging.getLogger(__name__)

_BLOCKS, _WINDOWS = "block-*.safetensors", "windows.safetensors"
_PARTIAL = ".partial"  # folder of files that are being written, and of what a killed run left of them
_SEPARATOR = "//"  # between the names of module and parameter and the suffix of the tensor, which may be empty


class BlockStore:
    """A folder with one safetensors file per finished block.

    Args:
        folder: created if it does not exist.
        identity: of the run, see `identity.py`.
        restart: delete blocks that are damaged or belong to another run, with those after them, instead of refusing.

    Raises:
        ValueError: a block is damaged, or belongs to another run.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Identity, restart: bool = False):
        self.folder = folder
        self._identity = identity
        _prepare(folder)
        files = sorted(folder.glob(_BLOCKS))
        for number, file in enumerate(files):
            if not _fits(file, identity, restart):
                for later in files[number:]:  # they were calibrated on the outputs of this one
                    later.unlink()
                break

    def holds(self, number: int) -> bool:
        """Whether a block is finished."""
        return self._file(number).is_file()

    def load(self, number: int) -> QuantizedLayers | None:
        """A block's layers, on the CPU; None if it is not finished."""
        if not self.holds(number):
            return None
        found, records = _read(self._file(number))
        tensors = {}
        for key, tensor in found.items():
            name, parameter, suffix = key.split(_SEPARATOR)
            tensors[name, parameter, suffix] = tensor
        return QuantizedLayers.of(tensors, [LayerRecord(**record) for record in json.loads(records)])

    def save(self, number: int, result: QuantizedLayers) -> None:
        """Keep a finished block.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {_SEPARATOR.join(names): tensor.cpu().contiguous() for names, tensor in result.tensors().items()}
        records = json.dumps([asdict(record) for record in result.records])
        _save_whole(tensors, self._file(number), self._identity, records)

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"


def keep_windows(folder: Path, identity: Identity, generate: Callable[[], Tensor], restart: bool = False) -> Tensor:
    """Windows that a model generates, kept in a folder, from which a resumed run reads them.

    Generating takes long, and an accelerator may not generate the same text again.

    Raises:
        ValueError: the folder holds the windows of another run, or damaged ones, and `restart` is not set.
        OSError: the folder cannot be written.
    """
    file = folder / _WINDOWS
    if file.is_file() and _fits(file, identity, restart):
        return _read(file)[0]["windows"]
    _prepare(folder)
    windows = generate()
    _save_whole({"windows": windows}, file, identity)
    return windows


def kept_windows(folder: Path) -> Tensor | None:
    """The windows that a run in this folder has generated, int64 `[n, L]`; None if its text was given."""
    file = folder / _WINDOWS
    return _read(file)[0]["windows"] if file.is_file() else None


def clear(folder: Path) -> None:
    """Delete the files of a finished run, and their folder if nothing else is in it."""
    if folder.is_dir():
        for file in [*folder.glob(_BLOCKS), folder / _WINDOWS]:
            file.unlink(missing_ok=True)
        tidy(folder)


def tidy(folder: Path) -> None:
    """Delete what a run was writing in a folder when it ended, and the folder if nothing else is in it."""
    if folder.is_dir():
        shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _prepare(folder: Path) -> None:
    """Create the folder, or delete what a killed run was writing there."""
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _fits(file: Path, identity: Identity, restart: bool) -> bool:
    """Whether a file is whole and belongs to the run.

    Raises:
        ValueError: it is not, and `restart` is not set.
    """
    problem = _problem(file, identity)
    if problem is None:
        return True
    if not restart:
        raise ValueError(
            f"{file} {problem}. Delete {file.parent} or use --force (restart=True) to compute again what does not "
            "fit, or choose another folder"
        )
    logger.warning("%s %s: it is computed again", file, problem)
    return False


def _problem(file: Path, identity: Identity) -> str | None:
    """Why a file cannot be used; None if it can."""
    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
        found = json.loads(metadata.get("identity", "{}"))
        if found != identity:
            return f"belongs to another run, which differs in {differences(found, identity)}"
        tensors, records = _read(file)
    except (SafetensorError, json.JSONDecodeError) as error:
        return f"is damaged ({error})"
    if metadata.get("checksum") != _checksum(file.name, tensors, records):
        return "is damaged (its checksum is not that of its contents)"
    return None


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and the records in its metadata."""
    with safe_open(file, "pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}, (content.metadata() or {}).get("records", "")


def _checksum(name: str, tensors: dict[str, Tensor], records: str) -> str:
    """SHA-256 of everything in a file, its name included, which says which block it is."""
    sha = hashlib.sha256(f"{name}\n{records}\n".encode())
    for key in sorted(tensors):
        update_with_tensor(sha, key, tensors[key])
    return sha.hexdigest()


def _save_whole(tensors: dict[str, Tensor], file: Path, identity: Identity, records: str = "[]") -> None:
    """Write a file in a folder of its own and move it from there, so that it is never incomplete."""
    metadata = {"identity": json.dumps(identity), "records": records}
    metadata["checksum"] = _checksum(file.name, tensors, records)
    partial = file.parent / _PARTIAL / file.name
    try:
        partial.parent.mkdir(exist_ok=True)
        save_file(tensors, partial, metadata)
        os.replace(partial, file)
        partial.parent.rmdir()
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial.parent, ignore_errors=True)
        raise OSError(f"{file} could not be written: {error}") from error
