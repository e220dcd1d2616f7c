"""The inputs of a block's layers while it runs, and which layers share theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..processes import Processes
from .activations import Activations


class Stop(Exception):
    """Ends a forward pass from inside."""


@contextmanager
def recorded_inputs(layers: dict[str, nn.Module], last: str | None = None) -> Iterator[dict[str, Tensor]]:
    """A dictionary that collects the inputs of layers as they run, in that order; clear it between batches.

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
    """The inputs of a block's layers in the original model, batch by batch, and which layers share theirs.

    Args:
        names: of all layers.
        kept: stores the inputs, by the number of the batch and the first layer of each group; None stores nothing.
    """

    def __init__(self, names: list[str], kept: Activations | None):
        self._names, self._kept = names, kept
        self._leader: dict[str, str] = {}

    def add(self, batch: int, inputs: dict[str, Tensor]) -> None:
        """Record one batch of windows, from the dictionary of `recorded_inputs`."""
        leaders: dict[int, str] = {}
        for name, tensor in inputs.items():
            leader = leaders.setdefault(id(tensor), name)
            self._leader.setdefault(name, leader)
        if self._kept is not None:
            for leader in leaders.values():
                self._kept[batch, leader] = inputs[leader]

    def agree(self, processes: Processes) -> None:
        """Know which layers ran in any process, and which share their inputs, as one that saw all windows would."""
        leaders: dict[str, str] = {}
        for _, seen in processes.gather({}, self._leader):
            for name, leader in seen.items():
                leaders.setdefault(name, leader)
        self._leader = leaders

    def knows(self, name: str, batch: int) -> bool:
        """Whether the input of a layer for a batch is stored."""
        return self._kept is not None and (batch, self._leader[name]) in self._kept

    def of(self, name: str, batch: int) -> Tensor | None:
        """The stored input of a layer for a batch; None if there is none."""
        return self._kept[batch, self._leader[name]] if self.knows(name, batch) else None

    def groups(self) -> list[list[str]]:
        """Layers that share their input, in the order in which they run."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def idle(self) -> list[str]:
        """Layers that did not run for any batch."""
        return [name for name in self._names if name not in self._leader]
