"""The inputs of a block's layers while it runs, and their moments, counted once where layers share an input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .hessian import InputMoments


@contextmanager
def recorded_inputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the input of every layer that ran since it was last cleared."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str):
        return lambda module, args: inputs.__setitem__(name, args[0])

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class SharedMoments:
    """Moments of the inputs of several layers. Layers whose input is the same tensor are found and share theirs.

    Args:
        names: of all layers, in the model's order.
        cross: also compare with the inputs of the original model.
        device: where the moments are kept.
    """

    def __init__(self, names: list[str], cross: bool, device: torch.device):
        self._names, self._cross, self._device = names, cross, device
        self._leader: dict[str, str] = {}
        self._moments: dict[str, InputMoments] = {}

    def add(self, inputs: dict[str, Tensor], original: dict[str, Tensor]) -> None:
        """Count the inputs of one window, `[..., K]`, and what they are in the original model."""
        leaders: dict[int, str] = {}
        for name in self._names:
            if name in inputs:  # an expert may have seen no token
                self._leader.setdefault(name, leaders.setdefault(id(inputs[name]), name))
        for leader in dict.fromkeys(self._leader[name] for name in inputs):
            x = inputs[leader].flatten(0, -2)
            moments = self._moments.get(leader)
            if moments is None:
                moments = self._moments[leader] = InputMoments(x.shape[1], self._device, self._cross)
            before = original.get(leader)
            # Experts may get other tokens than in the original model: then there is nothing to compare with.
            paired = before is not None and before.ndim == 3 and before.shape == inputs[leader].shape
            moments.add(x, before.flatten(0, -2) if paired else None)

    def groups(self) -> list[tuple[list[str], InputMoments | None]]:
        """Layers with a common input and its moments, None for a layer that was never run."""
        members: dict[str, list[str]] = {}
        for name in self._names:
            members.setdefault(self._leader.get(name, name), []).append(name)
        return [(names, self._moments.get(leader)) for leader, names in members.items()]
