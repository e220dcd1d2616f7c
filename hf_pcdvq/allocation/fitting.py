"""Whether a saved allocation belongs to a model: its patterns alone would not tell, since one that matches nothing says nothing."""

from __future__ import annotations

import re

from torch import nn

from ..calibration.blocks import find_blocks
from ..config import PackedConfig
from .report import Allocation


def check_fits(allocation: Allocation, model: nn.Module, names: list[str], config: PackedConfig) -> None:
    """Refuse an allocation of another model, or one whose layers other options change.

    Args:
        allocation: what bits were chosen for.
        model: dense or packed.
        names: the modules to pack, or that are packed.
        config: with the base and the overrides of the allocation, and whatever the user asks for beside it.

    Raises:
        ValueError: a layer of the allocation is not packed or gets another setting, or a layer of a decoder block is packed
            and the allocation says nothing of it. The message names the first.
    """
    kind, packed = type(model).__name__, set(names)
    for group in allocation.groups:
        expected = config.codec_with_setting(group.setting)
        for name in group.modules:
            if name not in packed:
                raise ValueError(
                    f"the allocation gives {group.setting} to {name}, which is no layer to pack in this {kind}. Use the "
                    "allocation of this model, or repeat it with what is to be skipped or left dense"
                )
            if (found := config.codec_of(name)) != expected:
                raise ValueError(
                    f"the allocation gives {group.setting} to {name}, which would get {found}: an override comes before it. "
                    "Leave that out, or repeat the allocation with it"
                )
    prefix = find_blocks(model, names)
    known = {name for group in allocation.groups for name in group.modules}
    for name in names:
        if (
            name.startswith(f"{prefix}.")
            and name not in known
            and not any(re.search(pattern, name) for pattern, _ in allocation.overrides)
        ):
            raise ValueError(
                f"the allocation says nothing of {name}, which would be packed in this {kind}. Use the allocation of this "
                "model, skip the layers that it was made without, or repeat it"
            )
