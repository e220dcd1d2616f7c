"""`Shortcuts`: parts of a decoder block whose output is known already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .activations import Activations
from .blocks import Call, form_of, hidden_of, replaced_forward, run_block


class Shortcuts:
    """Saves a block from computing modules again whose output is known.

    Attention ends in its output projection, an MLP in its down projection. Once the input of such a final layer is
    known for a batch, and nothing that runs before the layer will change, the module does not have to be computed
    again: its output is the layer applied to that input. That output takes the place of the input when it is first
    needed, by when the layer must have its last weights. Running the block once shows which layers are final: the
    module then returns the same tensor object as the layer.

    Args:
        block: on the device of `hidden`.
        layers: the layers whose inputs may be kept, by name.
        hidden, call: what to run the block with.
        known: keeps inputs, and later outputs, by the name of the layer and the number of the batch.
    """

    def __init__(
        self, block: nn.Module, layers: dict[str, nn.Module], hidden: Tensor, call: Call, known: Activations
    ):
        self._layers, self._known = layers, known
        self._ends = _ending_modules(block, layers, hidden, call)
        self._applied: set[tuple[str, int]] = set()  # those of which the outputs are kept

    def keep(self, name: str, batch: int, inputs: Tensor) -> None:
        """Keep the input of a layer for a batch, if the layer is the final one of its module."""
        if name in self._ends:
            self._known[name, batch] = inputs

    @contextmanager
    def taken(self, batch: int) -> Iterator[None]:
        """Replace the forward pass of every module that has a shortcut for a batch."""
        with ExitStack() as stack:
            for name, (module, wrap) in self._ends.items():
                if (name, batch) in self._known:
                    stack.enter_context(replaced_forward(module, self._replay(name, batch, wrap)))
            yield

    def _replay(self, name: str, batch: int, wrap: Callable[[Tensor], Any]) -> Callable:
        return lambda *args, **kwargs: wrap(self._output(name, batch))

    def _output(self, name: str, batch: int) -> Tensor:
        layer = self._layers[name]
        tensor = self._known[name, batch].to(layer.weight.device)
        if (name, batch) not in self._applied:
            tensor = layer(tensor)
            self._known[name, batch] = tensor
            self._applied.add((name, batch))
        return tensor


def _ending_modules(
    block: nn.Module, layers: dict[str, nn.Module], hidden: Tensor, call: Call
) -> dict[str, tuple[nn.Module, Callable[[Tensor], Any]]]:
    """For layers that run once and whose output is their parent module's: the parent, and how it returns outputs."""
    outputs: dict[nn.Module, list[Any]] = {}
    parents = {
        name: module for module in block.modules() for name, layer in layers.items() if layer in module.children()
    }
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.setdefault(module, []).append(output))
        for module in {*layers.values(), *parents.values()}
    ]
    try:
        run_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    ends = {}
    for name, layer in layers.items():
        own, around = outputs.get(layer, []), outputs.get(parents[name], [])
        if parents[name] is not block and len(own) == len(around) == 1 and hidden_of(around[0]) is own[0]:
            ends[name] = (parents[name], form_of(around[0]))
    return ends
