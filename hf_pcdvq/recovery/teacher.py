"""The teacher's logits, computed as they are needed, or once and kept on disk where windows are repeated."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PARTIAL = ".partial"


class Teacher:
    """The original model's logits on windows of tokens.

    Args:
        model: on its device, ready to run.
        windows: int64 `[n, L]`.
        folder: keeps the logits of the first windows; None keeps none.
        limit: bytes that they may take.
        micro_batch: windows that are computed at once.
    """

    def __init__(self, model: nn.Module, windows: Tensor, folder: Path | None, limit: int, micro_batch: int):
        self._model, self._windows, self._folder = model, windows, folder
        self._device = next(model.parameters()).device
        self._micro_batch = micro_batch
        itemsize = next(model.parameters()).dtype.itemsize
        size = windows.shape[1] * model.get_output_embeddings().weight.shape[0] * itemsize
        self._kept = 0 if folder is None else min(len(windows), limit // size)

    def prepare(self) -> None:
        """Compute the logits that are kept. Those that an interrupted run has left are not computed again."""
        if not self._kept:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, self._kept, self._micro_batch):
            numbers = list(range(start, min(start + self._micro_batch, self._kept)))
            # All of a batch or none: with others beside it, a window's logits may differ in their last bits.
            if any(self._read(number) is None for number in numbers):
                for number, logits in zip(numbers, self._compute(numbers)):
                    self._write(number, logits)

    def logits(self, numbers: list[int]) -> Tensor:
        """Logits `[len(numbers), L, vocabulary]` on the teacher's device."""
        missing = [number for number in numbers if number >= self._kept]
        computed = dict(zip(missing, self._compute(missing))) if missing else {}
        if len(missing) == len(numbers):
            return torch.stack(list(computed.values())) if len(missing) > 1 else next(iter(computed.values()))[None]
        return torch.stack([computed[n] if n in computed else self._kept_logits(n) for n in numbers])

    @torch.no_grad()
    def _compute(self, numbers: list[int]) -> Tensor:
        return self._model(input_ids=self._windows[numbers].to(self._device), use_cache=False).logits

    def _kept_logits(self, number: int) -> Tensor:
        logits = self._read(number)
        if logits is None:
            raise OSError(f"{self._file(number)} has been deleted or damaged during the run; start it again")
        return logits.to(self._device)

    def _file(self, number: int) -> Path:
        return self._folder / f"logits-{number:06d}.safetensors"

    def _read(self, number: int) -> Tensor | None:
        try:
            return load_file(self._file(number))["logits"]
        except (FileNotFoundError, SafetensorError):
            return None

    def _write(self, number: int, logits: Tensor) -> None:
        partial = self._folder / _PARTIAL
        try:
            save_file({"logits": logits.cpu().contiguous().clone()}, partial)
            os.replace(partial, self._file(number))
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{self._file(number)} could not be written: {error}; cache_bytes=0 keeps no logits"
            ) from error
