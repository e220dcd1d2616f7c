"""A decoder block while it is quantized: the hidden states before and after it, and the inputs of its layers."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass

from torch import Tensor, device, nn

from .blocks import Call, Shortcuts, run_block
from .experts import RoutedTokens, routed_tokens
from .guidance import Sensitivity
from .hessian import InputMoments
from .inputs import OriginalInputs, Stop, recorded_inputs


@dataclass
class DecoderBlock:
    """A decoder block with the hidden states of all windows before it, which the two `advance` methods replace.

    Attributes:
        module: the block, on `device`.
        layers: its layers to quantize, by name. They stay dense; once quantized, their weights are the decoded ones.
        call: what the block is called with besides hidden states, on `device`.
        original: hidden states `[1, L, D]` of every window in the original model, on `memory`.
        hidden: the same in the model quantized so far.
        device: where the block is computed.
        memory: the device where hidden states and inputs are kept.
    """

    module: nn.Module
    layers: dict[str, nn.Module]
    call: Call
    original: list[Tensor]
    hidden: list[Tensor]
    device: device
    memory: device
    shortcuts: Shortcuts | None = None

    def find_shortcuts(self) -> None:
        """Skip recomputing parts of the block that have not changed, from now on."""
        layers = {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Linear)}
        self.shortcuts = Shortcuts(self.module, layers, self.hidden[0].to(self.device), self.call, self.memory)

    def forward(self, index: int) -> Tensor:
        """The hidden states of a window after the block in its current state."""
        with self.shortcuts.taken(index) if self.shortcuts else nullcontext():
            return run_block(self.module, self.hidden[index].to(self.device), self.call).to(self.memory)

    def advance(self) -> None:
        """Replace the hidden states before the block by those after it."""
        for index in range(len(self.hidden)):
            self.hidden[index] = self.forward(index)

    def advance_original(self, keep: bool) -> OriginalInputs:
        """Replace the original's hidden states by those after the block, which must be unchanged.

        Returns:
            The inputs of the layers for all windows, stored if `keep`.
        """
        found = OriginalInputs(list(self.layers), self.memory if keep else None)
        with recorded_inputs(self.layers) as inputs:
            for index, states in enumerate(self.original):
                self.original[index] = run_block(self.module, states.to(self.device), self.call).to(self.memory)
                found.add(inputs)
                inputs.clear()
        return found

    def moments(
        self, groups: list[list[str]], inputs: OriginalInputs, sensitivity: Sensitivity, with_change: bool
    ) -> dict[str, InputMoments]:
        """Moments of the inputs that groups of linear layers receive from the block in its current state.

        Args:
            groups: names of layers with a common input.
            inputs: what the layers receive in the original model.
            sensitivity: of the model's predictions to the outputs of some of the layers.
            with_change: see `InputMoments`.

        Returns:
            Moments by the first name of each group.
        """
        leaders = {names[0]: names for names in groups}
        moments = {name: InputMoments(self.layers[name].in_features, self.device, with_change) for name in leaders}
        last = groups[0][0] if len(groups) == 1 else None
        with recorded_inputs({name: self.layers[name] for name in leaders}, last) as now:
            for index in range(len(self.hidden)):
                with suppress(Stop):
                    self.forward(index)
                for name, tensor in now.items():
                    squares = {layer: sensitivity[layer][index] for layer in leaders[name] if layer in sensitivity}
                    moments[name].add(tensor, inputs.of(name, index), squares)
                    if last is not None:  # with several groups, quantizing one changes the inputs of the others
                        self.shortcuts.keep(name, index, tensor)
                now.clear()
        return moments

    def routed_tokens(self, name: str, inputs: OriginalInputs) -> RoutedTokens:
        """The tokens that fused experts receive from the block in its current state."""
        originals = [inputs.of(name, index) for index in range(len(self.hidden))]
        return routed_tokens(self.layers[name], range(len(self.hidden)), self.forward, originals)
