"""Folders of saved models: a result appears whole or not at all, and nothing is lost that nobody asked to replace."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .headers import checkpoint_files

# A model on the Hub: "gpt2" or "organization/name".
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def check_source(model: str) -> None:
    """Say what is wrong with a path that Transformers would look up on the Hub.

    Raises:
        FileNotFoundError: `model` is neither a folder nor can it be the name of a model on the Hub.
        NotADirectoryError: it is a file.
    """
    path = Path(model)
    if path.is_file():
        raise NotADirectoryError(f"{model} is a file; give the folder that holds it (and --gguf-file if it is one)")
    if not path.is_dir() and not _HUB_NAME.fullmatch(model):
        raise FileNotFoundError(f"there is no folder {model}")


def check_destination(out: Path, source: Path, force: bool) -> None:
    """Refuse a destination that holds something else than an older result, or the source itself.

    Args:
        out: the folder to write, an absolute path without symbolic links (`Path.resolve`).
        source: the folder of the model that is read; need not exist, as for a model on the Hub.
        force: whether a saved model in `out` may be replaced.

    Raises:
        ValueError: `out` is the source's folder or holds it, or, with `force`, holds anything but a saved model.
        FileExistsError: `out` is a file, or a folder that is not empty and `force` is not set.
    """
    if source.is_dir() and source.resolve().is_relative_to(out):
        raise ValueError(f"{out} is the source model's folder or holds it; choose another one to write to")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder to write to")
    if not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} is not empty; choose another folder, or --force to replace the model in it")
    # Everything in the folder will be deleted, so it must be what one expects to lose.
    if not (out / "config.json").is_file():
        raise ValueError(f"--force replaces saved models only, and {out} holds no config.json")
    if (out / ".git").exists():
        raise ValueError(f"{out} is a git repository, which --force would delete; choose another folder")


def check_writable(folder: Path) -> None:
    """Refuse a folder that new files could not be written to; one that does not exist yet is judged by its parents.

    Raises:
        NotADirectoryError: it, or what it would lie in, is a file.
        PermissionError: the user may not write there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; choose a folder to write to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} may not be written to; choose another folder with --out")


@contextmanager
def folder_in_place(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `out`, which is renamed to `out` at the end, and deleted instead if the body raises.

    Args and raises like `check_destination`, which is asked before and after.
    """
    check_destination(out, source, force)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        check_destination(out, source, force)  # it may have been filled in the meantime
        replace_folder(out, partial)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def replace_folder(out: Path, partial: Path) -> None:
    """Rename `partial` to `out`. What was there is deleted afterwards, and put back if the renaming fails."""
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
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


def weight_bytes(folder: Path, gguf_file: str | None = None) -> int:
    """Size of the files that a model's weights are loaded from: a GGUF file, safetensors or PyTorch's own format.

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
