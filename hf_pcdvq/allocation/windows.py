"""The tokens that an allocation works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..evaluation.metrics import check_windows

# What is used of the calibration data: few and short windows, since every group of layers is probed on them.
CALIBRATION, CALIBRATION_LENGTH = 32, 512
PROBE, PROBE_LENGTH = 8, 128
CHECK, CHECK_LENGTH = 8, 512


@dataclass(frozen=True)
class Windows:
    """Three sets of windows without a text in common, token ids int64 `[n, L]` each.

    Attributes:
        calibration: what models are calibrated on.
        probe: what sensitivities are measured on.
        check: what the mixed and the uniform model are compared on.
    """

    calibration: Tensor
    probe: Tensor
    check: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> Self:
        """From windows int64 `[n, L]` that a model is to be calibrated on.

        Raises:
            ValueError: there are fewer than three.
        """
        count, length = windows.shape
        if count < 3:
            raise ValueError(
                f'bits="auto" needs at least 3 windows of calibration text, to calibrate, to probe and to compare on; got '
                f"{count} of {length} tokens"
            )
        check, probe = min(CHECK, count // 3), min(PROBE, count // 3)
        rest = windows[: count - check - probe]
        return cls(
            rest[:CALIBRATION, :CALIBRATION_LENGTH],
            windows[len(rest) : len(rest) + probe, :PROBE_LENGTH],
            windows[count - check :, :CHECK_LENGTH],
        )

    def check_for(self, model: torch.nn.Module) -> None:
        """Refuse windows that do not fit a model, with a ValueError."""
        for windows in (self.calibration, self.probe, self.check):
            check_windows(model, windows)

    def all_tokens(self) -> Tensor:
        """All tokens with the shapes of the sets, int64 `[1, n]`, to tell one run from another."""
        parts = [self.calibration, self.probe, self.check]
        return torch.cat([torch.tensor([*part.shape, *part.flatten()]) for part in parts])[None]
