"""Figures on disk, so that an interrupted allocation can resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..calibration.identity import Identity, differences
from ..calibration.store import clear as clear_run
from ..calibration.store import tidy
from ..files.records import read_object, write_text

FOLDER = "allocation"  # in the folder of a run, for finished parts of the allocation
SMALLEST, UNIFORM, MIXED = STEPS = ("smallest", "uniform", "mixed")  # models that are quantized for it
SENSITIVITY, RESULT = RECORDS = ("sensitivity", "result")

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class RecordStore:
    """Named values in a JSON file, with the identity of the run that they belong to.

    Args:
        file: its folder is created; None keeps the values in memory only.
        identity: of the run.
        restart: start again where the file belongs to another run, or is damaged, instead of refusing it.

    Attributes:
        values: by name.

    Raises:
        ValueError: the file belongs to another run, or is damaged.
        OSError: it cannot be written.
    """

    def __init__(self, file: Path | None, identity: Identity, restart: bool):
        self._file, self._identity, self._restart = file, identity, restart
        self.values: dict[str, Any] = {}
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            return
        problem = self._read()
        if problem is not None:
            self._refuse(problem)

    def _read(self) -> str | None:
        """Take the values of the file, or say why not."""
        try:
            content = read_object(self._file)
        except ValueError as error:
            return f"is damaged ({error})"
        found, values = content.get("identity"), content.get("values")
        if found != self._identity:
            return f"belongs to another run, which differs in {differences(found, self._identity)}"
        if not isinstance(values, dict):
            return "is damaged (it holds no values)"
        self.values = values
        return None

    def _refuse(self, problem: str) -> None:
        """Raise because of what is wrong with the file; or with `restart`, warn that it is computed again."""
        if not self._restart:
            raise ValueError(
                f"{self._file} {problem}. Delete {self._file.parent} or use --force (restart=True) to compute again what "
                "does not fit, or choose another folder"
            )
        logger.warning("%s %s: it is computed again", self._file, problem)

    def value(self, name: str, parse: Callable[[Any], Value]) -> Value | None:
        """What `parse` makes of a kept value; None if it is to be computed.

        Raises:
            ValueError: `parse` raised one, and it is not computed again.
        """
        if name not in self.values:
            return None
        try:
            return parse(self.values[name])
        except ValueError as error:
            self._refuse(f"is damaged ({name}: {error})")
            return None

    def add(self, name: str, value: Any) -> None:
        """Keep a value."""
        self.values[name] = value
        if self._file is not None:
            write_text(self._file, json.dumps({"identity": self._identity, "values": self.values}))


@contextmanager
def kept_until_done(work_dir: Path) -> Iterator[None]:
    """Delete the files of a run and of its allocation when the body ends; if it fails, only their folder if it is empty."""
    try:
        yield
        clear_all(work_dir)
    finally:
        tidy(work_dir)


def clear_all(work_dir: Path) -> None:
    """Delete the files of a finished run and of its allocation, and their folders if nothing else is in them."""
    folder = work_dir / FOLDER
    if folder.is_dir():
        for name in STEPS:
            clear_run(folder / name)
            (folder / f"{name}.json").unlink(missing_ok=True)
        for name in RECORDS:
            (folder / f"{name}.json").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    clear_run(work_dir)
