"""Where the weights of a model are while it is calibrated: in memory, or read part by part by whoever overrides this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..emulation import is_emulated
from ..evaluation.metrics import window_logits
from ..processes import Processes
from .blocks import streamed
from .identity import Identity, model_identity


class ModelWeights:
    """The weights of a model that is in memory.

    A unit is a part of the model that is read, quantized and written as a whole: a decoder block, or a part outside.
    Here all that is outside is one unit, and reading and writing do nothing.

    Args:
        model: on one device.

    Attributes:
        home: the device that the weights are on while they are not used.

    Raises:
        ValueError: it is spread over several devices, or on meta.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.home = _device_of(model)

    def identity(self, processes: Processes) -> Identity:
        """What the weights are, so that no run is resumed with others; the processes may share the work."""
        return model_identity(self.model)

    def outside(self, blocks: str) -> list[tuple[str, list[str] | None]]:
        """The units outside a list of blocks, each with the names of its modules; None stands for all outside."""
        return [("", None)]

    @contextmanager
    def loaded(self, *units: str) -> Iterator[None]:
        """Have the weights of units in memory."""
        yield

    @contextmanager
    def loaded_outside(self, blocks: str, head: bool) -> Iterator[None]:
        """Have the weights of all units outside the blocks in memory; without `head`, the output head need not be."""
        yield

    def finish(self, unit: str) -> None:
        """Take over a unit that is loaded and has its final state."""

    def logits(self, blocks: str, windows: Tensor, device: torch.device) -> Iterator[Tensor]:
        """The logits `[L - 1, vocabulary]` of every window of `[n, L]`, in the model's dtype.

        Args:
            blocks: name of the list of decoder blocks.
            device: where they are computed.

        Raises:
            NotImplementedError: the model cannot be run with the weights of one block at a time.
        """
        upcast = is_emulated(self.model.dtype, device)
        with streamed(self.model, self.model.get_submodule(blocks), device, upcast):
            for window in windows:
                yield window_logits(self.model, window)


def _device_of(model: nn.Module) -> torch.device:
    """The one device that the whole model is on."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or devices == {torch.device("meta")}:
        raise ValueError(
            f"calibration needs the whole model on one device, it is on {', '.join(sorted(map(str, devices)))}; "
            "load it with device_map='cpu': blocks move to the accelerator one at a time"
        )
    return devices.pop()
