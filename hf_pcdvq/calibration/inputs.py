"""The inputs of a block's layers while it runs, and which layers share theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Ends a forward pass from inside."""


@contextmanager
def recorded_inputs(layers: dict[str, nn.Module], last: str | None = None) -> Iterator[dict[str, Tensor]]:
    """A dictionary that collects the inputs of layers as they run, in that order; clear it between windows.

    Args:
        layers: by name.
        last: raise `Stop` before this layer runs; None lets all run.

    Raises (in the forward pass):
        NotImplementedError: a layer runs again before the dictionary is cleared.
    """
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable:
        def record(module: nn.Module, args: tuple) -> None:
            if name in inputs:
                raise NotImplementedError(
                    f"{name} runs more than once in its decoder block; such a layer cannot be calibrated. Leave it dense "
                    "with modules_to_not_convert, or quantize without calibration"
                )
            inputs[name] = args[0]
            if name == last:
                raise Stop

        return record

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class OriginalInputs:
    """The inputs of a block's layers in the original model, window by window, and which layers share theirs.

    Args:
        names: of all layers.
        keep: where the inputs are stored; None stores nothing.

    Attributes:
        windows: the stored inputs of every window, by the first layer of each group; empty if nothing is stored.
    """

    def __init__(self, names: list[str], keep: torch.device | None):
        self.windows: list[dict[str, Tensor]] = []
        self._names, self._keep = names, keep
        self._leader: dict[str, str] = {}

    def add(self, inputs: dict[str, Tensor]) -> None:
        """Record one window, from the dictionary of `recorded_inputs`."""
        leaders: dict[int, str] = {}
        for name, tensor in inputs.items():
            leader = leaders.setdefault(id(tensor), name)
            self._leader.setdefault(name, leader)
        kept = [] if self._keep is None else leaders.values()
        self.windows.append({leader: inputs[leader].to(self._keep) for leader in kept})

    def of(self, name: str, window: int) -> Tensor | None:
        """The stored input of a layer for a window; None if there is none."""
        return self.windows[window].get(self._leader[name])

    def groups(self) -> list[list[str]]:
        """Layers that share their input, in the order in which they run."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def idle(self) -> list[str]:
        """Layers that did not run for any window."""
        return [name for name in self._names if name not in self._leader]
