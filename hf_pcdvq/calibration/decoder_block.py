"""A decoder block while it is quantized: the hidden states before and after it, and the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from torch import Tensor, device, nn

from .activations import Activations
from .blocks import Call, run_block
from .experts import RoutedTokens, routed_tokens
from .hessian import InputMoments
from .inputs import OriginalInputs, Stop, recorded_inputs
from .shares import Shares, Sums
from .shortcuts import Shortcuts

# Sums of many groups are made in about so many passes over the windows, each for some of them: while they are added up,
# they take three times what they take in the end.
PARTS = 4


@dataclass
class DecoderBlock:
    """A decoder block with the hidden states of this process's windows before it, which the two `advance` methods replace.

    Windows go through it in batches, which are numbered.

    Attributes:
        module: the block, on `device`.
        layers: its layers to quantize, by name. They stay dense; once quantized, their weights are the decoded ones.
        calls: what the block is called with besides hidden states, on `device`, by the number of windows in the batch.
        original: hidden states `[b, L, D]` of every batch in the original model.
        hidden: the same in the model quantized so far.
        device: where the block is computed.
        activations: makes what further activations are kept in.
        shares: of the windows. All processes use the block in the same way.
    """

    module: nn.Module
    layers: dict[str, nn.Module]
    calls: dict[int, Call]
    original: Activations
    hidden: Activations
    device: device
    activations: Callable[[], Activations]
    shares: Shares
    shortcuts: Shortcuts | None = None

    def find_shortcuts(self) -> None:
        """Skip recomputing parts of the block that have not changed, from now on."""
        layers = {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Linear)}
        hidden = self.hidden[0].to(self.device)
        self.shortcuts = Shortcuts(self.module, layers, hidden, self.calls[len(hidden)], self.activations())

    def forward(self, batch: int) -> Tensor:
        """The hidden states of a batch after the block in its current state, on `device`."""
        with self.shortcuts.taken(batch) if self.shortcuts else nullcontext():
            return self._run(self.hidden[batch])

    def _run(self, hidden: Tensor) -> Tensor:
        return run_block(self.module, hidden.to(self.device), self.calls[len(hidden)])

    def advance(self) -> None:
        """Replace the hidden states before the block by those after it."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.forward(batch)

    def advance_original(self, keep: bool) -> OriginalInputs:
        """Replace the original's hidden states by those after the block, which must be unchanged.

        Returns:
            The inputs of the layers for these windows, stored if `keep`.
        """
        found = OriginalInputs(list(self.layers), self.activations() if keep else None)
        with recorded_inputs(self.layers) as inputs:
            for batch in range(len(self.original)):
                self.original[batch] = self._run(self.original[batch])
                found.add(batch, inputs)
                inputs.clear()
        found.agree(self.shares.processes)
        return found

    def moments(
        self,
        groups: list[list[str]],
        inputs: OriginalInputs,
        sensitivity: dict[str, Sequence[Tensor]],
        with_change: bool,
    ) -> dict[str, InputMoments]:
        """Moments of the inputs that groups of linear layers receive from the block in its current state.

        Args:
            groups: names of layers with a common input.
            inputs: what the layers receive in the original model.
            sensitivity: of the model's predictions to the outputs of some of the layers, `[tokens, groups]` of every batch.
            with_change: see `InputMoments`.

        Returns:
            Moments by the first name of each group, over the windows of all processes.
        """
        found: dict[str, InputMoments] = {}
        size = max(1, len(groups) // PARTS)
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            # With several groups, quantizing one changes the inputs of the others: nothing is kept of them.
            found |= self._moments(part, len(groups) == 1, inputs, sensitivity, with_change)
        return found

    def _moments(
        self,
        groups: list[list[str]],
        keep: bool,
        inputs: OriginalInputs,
        sensitivity: dict[str, Sequence[Tensor]],
        with_change: bool,
    ) -> Sums:
        """`moments` in one pass over the windows; `keep` lets the pass end at the group, and the next begin there."""
        leaders = {names[0]: names for names in groups}
        last = groups[0][0] if keep else None

        def nothing() -> Sums:
            return {name: InputMoments(self.layers[name].in_features, self.device, with_change) for name in leaders}

        def of(share: int) -> Sums:
            moments = nothing()
            for batch in self.shares.spans[share]:
                with suppress(Stop):
                    self.forward(batch)
                for name, tensor in now.items():
                    squares = {layer: sensitivity[layer][batch] for layer in leaders[name] if layer in sensitivity}
                    moments[name].add(tensor, inputs.of(name, batch), squares)
                    if keep:
                        self.shortcuts.keep(name, batch, tensor)
                now.clear()
            return moments

        with recorded_inputs({name: self.layers[name] for name in leaders}, last) as now:
            return self.shares.total(of, nothing)

    def routed_tokens(self, name: str, inputs: OriginalInputs) -> RoutedTokens:
        """The tokens of all windows that fused experts receive from the block in its current state."""
        batches = range(len(self.hidden))
        kept = self.activations()
        tokens = routed_tokens(self.layers[name], batches, self.forward, kept)
        if all(inputs.knows(name, batch) for batch in batches):
            kept.join("original", (inputs.of(name, batch) for batch in batches))
        return tokens.of_all(self.shares.processes, self.activations)
