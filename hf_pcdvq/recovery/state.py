"""The state of a run on disk, so that an interrupted one goes on where it was and ends with the same bytes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibration import store
from ..calibration.identity import Identity, differences
from .teacher import delete_logits

_STATE, _PARTIAL = "recovery.safetensors", "recovery.partial"
# Folders in that of the run, by names that nobody else gives: the teacher's logits, and text that it wrote.
_LOGITS, _TEXT = ".recovery-logits", ".recovery-text"
_OWNER = "identity.json"  # beside the logits: whose they are
_TENSORS = {"values", "best", "exp_avg", "exp_avg_sq", "step"}


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
        file = folder / _STATE
        problem = self._problem(file) if file.is_file() else None
        if problem is not None and not restart:
            raise ValueError(
                f"{file} {problem}. Delete it or use --force (restart=True) to start anew, or choose another folder"
            )
        if problem is not None:
            file.unlink()
        # Not before, because logits of a run that is refused are still wanted.
        self.logits = folder / _LOGITS
        owner, mine = self.logits / _OWNER, json.dumps(identity, sort_keys=True)
        if not owner.is_file() or owner.read_text(encoding="utf-8") != mine:
            _delete_logits(folder)
            self.logits.mkdir(exist_ok=True)
            owner.write_text(mine, encoding="utf-8")

    def _problem(self, file: Path) -> str | None:
        try:
            with safe_open(file, "pt") as content:
                found = json.loads(content.metadata()["identity"])
                Progress(**json.loads(content.metadata()["progress"]))
                missing = _TENSORS - set(content.keys())
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            return f"is damaged ({error})"
        if missing:
            return f"is damaged (it lacks {', '.join(sorted(missing))})"
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
        _delete_logits(folder)
        store.clear(text_folder(folder))
        for name in (_STATE, _PARTIAL):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def text_folder(folder: Path) -> Path:
    """Where a run in this folder keeps the text that its teacher wrote."""
    return folder / _TEXT


def _delete_logits(folder: Path) -> None:
    """Delete the kept logits with the note of whose they are, and nothing else that may be there."""
    logits = folder / _LOGITS
    if logits.is_dir():
        (logits / _OWNER).unlink(missing_ok=True)  # first: without it, the rest is nobody's
        delete_logits(logits)
        if not any(logits.iterdir()):
            logits.rmdir()
