"""`bits="auto"` on the way through a calibrated run: replaced, before anything is quantized, by what an allocation chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..calibration.identity import Identity
    from ..config import PackedConfig
    from .report import Allocation


def settle_bits(
    model: nn.Module,
    names: list[str],
    config: PackedConfig,
    windows: Tensor,
    device: torch.device,
    work_dir: Path | None,
    identity: Identity | None,
    restart: bool,
    progress: bool,
) -> Allocation:
    """Choose bits for the target of a config, and replace its `bits` and `overrides` in place.

    Args: see `allocate`; `windows` int64 `[n, L]` are those that the model will be calibrated on.
    """
    from .run import allocate  # which imports what imports this
    from .windows import Windows

    options: dict[str, Any] = {"work_dir": work_dir, "identity": identity, "restart": restart, "progress": progress}
    allocation = allocate(model, names, config, Windows.of(windows), device=device, **options)
    settled = config.settled(allocation.base, dict(allocation.overrides))
    config.__dict__.update(settled.__dict__)
    return allocation
