"""The teacher's logits, computed as they are needed, or once and kept where windows are repeated."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PARTIAL, _LOGITS = ".partial", "logits-{}.safetensors"


class Teacher:
    """The original model's logits on windows of tokens.

    Args:
        model: on its device, ready to run.
        windows: int64 `[n, L]`.
        folder: keeps logits on disk; None keeps them in memory, on the CPU.
        limit: bytes that they may take, those of the first windows; 0 keeps none.
        micro_batch: windows that are computed at once.
    """

    def __init__(self, model: nn.Module, windows: Tensor, folder: Path | None, limit: int, micro_batch: int):
        self._model, self._windows, self._folder = model, windows, folder
        self._device = next(model.parameters()).device
        self._limit, self._micro_batch = limit, micro_batch
        self._kept = 0
        self._memory: dict[int, Tensor] = {}

    def prepare(self) -> None:
        """Compute the logits that are kept. Those that an interrupted run has left are not computed again."""
        if not self._limit:
            return
        first = self._read(0)
        size = (self._compute([0]) if first is None else first).nbytes
        self._kept = min(len(self._windows), self._limit // size)
        for start in range(0, self._kept, self._micro_batch):
            numbers = list(range(start, min(start + self._micro_batch, self._kept)))
            # All of a batch or none: with others beside it, a window's logits may differ in their last bits.
            if any(self._read(number) is None for number in numbers):
                for number, logits in zip(numbers, self._compute(numbers)):
                    self._keep(number, logits.cpu().contiguous())

    def logits(self, numbers: list[int]) -> Tensor:
        """Logits `[len(numbers), L, vocabulary]` on the teacher's device."""
        missing = [number for number in numbers if number >= self._kept]
        computed = self._compute(missing) if missing else None
        if len(missing) == len(numbers):
            return computed
        rows = dict(zip(missing, computed)) if missing else {}
        return torch.stack([rows[number] if number in rows else self._kept_logits(number) for number in numbers])

    @torch.no_grad()
    def _compute(self, numbers: list[int]) -> Tensor:
        return self._model(input_ids=self._windows[numbers].to(self._device), use_cache=False).logits

    def _kept_logits(self, number: int) -> Tensor:
        logits = self._read(number)
        if logits is None:
            raise OSError(f"{self._file(number)} has been deleted or damaged during the run; start it again")
        return logits.to(self._device)

    def _file(self, number: int) -> Path:
        return self._folder / _LOGITS.format(f"{number:06d}")

    def _read(self, number: int) -> Tensor | None:
        """What is kept of a window; None if that is nothing, or damaged."""
        if self._folder is None:
            return self._memory.get(number)
        try:
            return load_file(self._file(number))["logits"]
        except (FileNotFoundError, SafetensorError):
            return None

    def _keep(self, number: int, logits: Tensor) -> None:
        if self._folder is None:
            self._memory[number] = logits
            return
        partial = self._folder / _PARTIAL
        try:
            save_file({"logits": logits}, partial)
            os.replace(partial, self._file(number))
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{self._file(number)} could not be written: {error}. Free space there, or keep the state elsewhere "
                "(--work-dir, work_dir)"
            ) from error


def delete_logits(folder: Path) -> None:
    """Delete the logits that a teacher has kept in a folder."""
    for file in [*folder.glob(_LOGITS.format("*")), folder / _PARTIAL]:
        file.unlink(missing_ok=True)
