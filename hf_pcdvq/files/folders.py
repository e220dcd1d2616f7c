"""Folders of saved models: results are written atomically, and nothing is replaced without being asked to."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .headers import checkpoint_files
from .scratch import sigterm_as_exit

# A model on the Hub: "gpt2" or "organization/name".
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def check_source(model: str) -> None:
    """Reject a path that Transformers would look up on the Hub instead of reporting it.

    Raises:
        FileNotFoundError: `model` is not a folder, and cannot be the name of a model on the Hub.
        NotADirectoryError: `model` is a file.
    """
    path = Path(model)
    if path.is_file():
        raise NotADirectoryError(f"{model} is a file; pass its folder (and --gguf-file if it is a GGUF file)")
    if not path.is_dir() and not _HUB_NAME.fullmatch(model):
        raise FileNotFoundError(f"folder {model} does not exist")


def check_destination(out: Path, source: Path, force: bool) -> None:
    """Reject a destination that contains the source, or anything but an earlier result.

    Args:
        out: the folder to write, an absolute path without symbolic links (`Path.resolve`).
        source: the folder of the model to read; it does not exist if the model is on the Hub.
        force: whether a saved model in `out` may be replaced.

    Raises:
        ValueError: `out` is or contains the source's folder, or, with `force`, contains anything but a saved model.
        FileExistsError: `out` is a file, or a folder that is not empty while `force` is not set.
    """
    if source.is_dir() and source.resolve().is_relative_to(out):
        raise ValueError(f"{out} is or contains the source model's folder; choose another folder to write to")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder to write to")
    if not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} is not empty; choose another folder, or --force to replace the model in it")
    # Everything in the folder will be deleted, so make sure that it is a saved model and nothing more.
    if not (out / "config.json").is_file():
        raise ValueError(f"--force only replaces saved models, and {out} contains no config.json")
    if (out / ".git").exists():
        raise ValueError(f"{out} is a git repository, which --force would delete; choose another folder")


def check_writable(folder: Path) -> None:
    """Reject a folder that is not writable. If it does not exist yet, its closest existing parent is checked.

    Raises:
        NotADirectoryError: the folder, or one of its parents, is a file.
        PermissionError: the user has no permission to write there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; choose a folder to write to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is not writable; choose another folder with --out")


@contextmanager
def folder_in_place(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """Create a folder beside `out`, rename it to `out` on success, and delete it if the body raises or SIGTERM comes.

    What a killed process left beside `out` is cleared first: an unfinished folder is deleted, and a model that was to be
    replaced, and has not been, is put back. A lock, which ends with its process, tells such remains from the work of
    another process.

    Takes the arguments and raises the errors of `check_destination`, which runs before and after the body; in addition,

    Raises:
        BlockingIOError: another process is writing `out`.
    """
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out), sigterm_as_exit():
        _clear_remains(out)
        check_destination(out, source, force)
        partial = _beside(out, "partial")
        partial.mkdir()
        try:
            yield partial
            check_destination(out, source, force)  # it may have been filled in the meantime
            replace_folder(out, partial)
        finally:
            if partial.exists():
                shutil.rmtree(partial)


def replace_folder(out: Path, partial: Path) -> None:
    """Rename `partial` to `out`. An existing `out` is deleted afterwards, or restored if the rename fails."""
    old = _beside(out, "replaced")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _beside(out: Path, purpose: str) -> Path:
    return out.with_name(f".{out.name}.{purpose}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from writing `out`."""
    lock = FileLock(_beside(out, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process is writing {out}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        _beside(out, "lock").unlink(missing_ok=True)  # before the release, after which it may be another's
        lock.release()


def _clear_remains(out: Path) -> None:
    """Clear what a killed process left beside `out`, which this process has locked."""
    old, partial = _beside(out, "replaced"), _beside(out, "partial")
    if old.exists() and not out.exists():
        old.rename(out)
    for remains in (old, partial):
        if remains.exists():
            shutil.rmtree(remains)


def weight_bytes(folder: Path, gguf_file: str | None = None) -> int:
    """Size in bytes of the files that hold a model's weights: a GGUF file, safetensors, or PyTorch's own format.

    Raises:
        FileNotFoundError: a file is missing.
    """
    if gguf_file:
        files = [folder / gguf_file]
    elif (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        files = checkpoint_files(folder)
    else:
        files = list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)
