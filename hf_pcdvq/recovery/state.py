"""The state of a run on disk, so that an interrupted one goes on where it was and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.identity import Identity, differences

_STATE, _PARTIAL, _LOGITS = "recovery.safetensors", "recovery.partial", "teacher"
_WINDOWS = "windows.safetensors"  # text that the model wrote, see `calibration.store.keep_windows`


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps that are done.
        tensors: the vector, the optimizer's moments, and the best vector so far.
        losses: training loss of every step, in nats per prediction.
        evaluations: pairs of the step and the figures on held-out text.
        seconds: time spent so far.
    """

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0


class RunFolder:
    """The folder of a run.

    Args:
        folder: created if it does not exist.
        identity: what the result depends on; a state of another run is refused.
        restart: delete the state of another run, or a damaged one, instead of refusing it.

    Raises:
        ValueError: it holds the state of another run, or a damaged one.
    """

    def __init__(self, folder: Path, identity: Identity, restart: bool = False):
        self._folder, self._identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)
        self.logits = folder / _LOGITS
        owner = self.logits / "identity.json"
        mine = json.dumps(identity, sort_keys=True)
        if not owner.is_file() or owner.read_text(encoding="utf-8") != mine:
            shutil.rmtree(self.logits, ignore_errors=True)
            self.logits.mkdir()
            owner.write_text(mine, encoding="utf-8")
        file = folder / _STATE
        problem = self._problem(file) if file.is_file() else None
        if problem is not None and not restart:
            raise ValueError(
                f"{file} {problem}. Delete it or use --force (restart=True) to start anew, or choose another folder"
            )
        if problem is not None:
            file.unlink()

    def _problem(self, file: Path) -> str | None:
        try:
            with safe_open(file, "pt") as content:
                found = json.loads(content.metadata()["identity"])
                json.loads(content.metadata()["progress"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            return f"is damaged ({error})"
        if found != self._identity:
            return f"belongs to another run, which differs in {differences(found, self._identity)}"
        return None

    def load(self) -> Progress | None:
        """What an interrupted run has done; None if there was none."""
        file = self._folder / _STATE
        if not file.is_file():
            return None
        with safe_open(file, "pt") as content:
            fields = json.loads(content.metadata()["progress"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        fields["evaluations"] = [tuple(pair) for pair in fields["evaluations"]]
        return Progress(tensors=tensors, **fields)

    def save(self, progress: Progress) -> None:
        """Keep the state, under a temporary name until it is whole.

        Raises:
            OSError: it cannot be written.
        """
        fields = {name: value for name, value in vars(progress).items() if name != "tensors"}
        metadata = {"identity": json.dumps(self._identity), "progress": json.dumps(fields)}
        partial = self._folder / _PARTIAL
        try:
            save_file({name: tensor.detach().cpu() for name, tensor in progress.tensors.items()}, partial, metadata)
            os.replace(partial, self._folder / _STATE)
        except (SafetensorError, OSError) as error:
            raise OSError(f"{self._folder / _STATE} could not be written: {error}") from error


def clear(folder: Path) -> None:
    """Delete the files of a finished run, and their folder if nothing else is in it."""
    if folder.is_dir():
        shutil.rmtree(folder / _LOGITS, ignore_errors=True)
        for name in (_STATE, _PARTIAL, _WINDOWS):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
