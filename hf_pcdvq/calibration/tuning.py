"""Training what is still dense to make up for the errors of what is packed, after every decoder block.

The correction of a layer (`layers.py`) restores the layer's own outputs, and knows neither what they are used for nor the
layers after it. Here all blocks after the one that was just packed are trained for a few steps on KL(original || model
so far) of the predictions. What they have become is quantized next, and corrected only for errors within the block. Files do
not grow. QuIP# (arXiv 2402.04396, section 5) trains so within a block, towards its output.

The model's own forward pass does the rest, so that nothing here depends on the architecture: blocks up to the packed one
return its hidden states, which are known, without computing.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..emulation import placed, to_device
from ..evaluation.divergence import NotFiniteError, divergence
from .activations import Activations
from .blocks import replaced_forward

_WINDOWS = 2  # per step
_BETAS = (0.9, 0.95)  # there are few steps: the default of 0.999 would average over all of them


class Tuning:
    """The original's predictions, and the optimizer of what is still dense.

    Held besides the model are a copy of it, and for every weight that is trained 12 bytes in float32.

    Args:
        model: dense, without dropout.
        blocks: its decoder blocks.
        layers: those that will be packed. Their weights are trained, and every parameter of one dimension (norms,
            biases) that comes after what is packed.
        batches: token ids int64 `[b, L]` of the windows.
        wrap: puts hidden states in the form in which a block returns them.
        steps: after every block.
        rate: of learning.
        seed: orders the windows.
        device: where everything is computed.
        upcast: compute in float32 what is held in 16-bit floats.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        layers: Sequence[nn.Module],
        batches: Sequence[Tensor],
        wrap: Callable[[Tensor], Any],
        *,
        steps: int,
        rate: float,
        seed: int,
        device: torch.device,
        upcast: bool,
    ):
        self._model, self._blocks, self._wrap = model, blocks, wrap
        self._steps, self._device, self._upcast = steps, device, upcast
        self._original = copy.deepcopy(model).requires_grad_(False)
        self._windows = [
            (batch, row, window) for batch, rows in enumerate(batches) for row, window in enumerate(rows)
        ]
        self._order = _shuffled(len(self._windows), seed)
        weights = {weight for layer in layers for weight in layer.parameters()}
        inside = {parameter for block in blocks for parameter in block.parameters()}
        self._of_block = [
            [weight for weight in block.parameters() if weight in weights or _is_vector(weight)] for block in blocks
        ]
        outside = [weight for weight in model.parameters() if weight not in inside and _is_vector(weight)]
        # In float32, since steps are finer than 16-bit floats; the model computes with what they are rounded to.
        self._masters = {
            parameter: nn.Parameter(parameter.detach().to(device, torch.float32, copy=True))
            for parameter in (*itertools.chain(*self._of_block[1:]), *outside)
        }
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=rate, betas=_BETAS, weight_decay=0)

    @torch.enable_grad()
    def after(self, number: int, hidden: Activations) -> float | None:
        """Train the blocks after block `number`, which has just been packed.

        Args:
            hidden: its outputs `[b, L, D]` for every batch.

        Returns:
            KL(original || model so far) in nats, the mean over the steps; None after the last block.

        Raises:
            NotFiniteError: it is not finite.
        """
        if number + 1 == len(self._blocks):
            return None
        self._forget(self._of_block[number])
        losses = []
        with ExitStack() as stack:
            stack.enter_context(placed(self._original, self._device, self._upcast))
            stack.enter_context(placed(self._model, self._device, self._upcast))
            stack.enter_context(_trainable(self._model, self._masters))
            for _ in range(self._steps):
                losses += [self._backward(number, hidden, next(self._order)) for _ in range(_WINDOWS)]
                self._step()
        return sum(losses) / len(losses)

    def _backward(self, number: int, hidden: Activations, window: int) -> float:
        """The loss of a window, whose gradient is added to that of the parameters."""
        batch, row, ids = self._windows[window]
        states = to_device(hidden[batch][row : row + 1], self._device, self._upcast)
        ids = ids[None].to(self._device)
        with torch.no_grad():
            expected = self._original(input_ids=ids, use_cache=False).logits
        with _known_up_to(self._blocks[: number + 1], self._wrap(states)):
            logits = self._model(input_ids=ids, use_cache=False).logits
        loss = divergence(logits, expected) / ids.numel()
        if not loss.isfinite():
            raise NotFiniteError(
                f"KL(original || packed so far) is {loss.item()} after decoder block {number}: take a smaller "
                "tune_rate, or tune_steps=0"
            )
        (loss / _WINDOWS).backward()
        return loss.item()

    @torch.no_grad()
    def _step(self) -> None:
        for parameter, master in self._masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)
            master.grad = None

    def _forget(self, parameters: list[nn.Parameter]) -> None:
        """Train some no longer."""
        for parameter in parameters:
            master = self._masters.pop(parameter, None)
            if master is not None:
                self._optimizer.state.pop(master, None)
        self._optimizer.param_groups[0]["params"] = list(self._masters.values())


@contextmanager
def _trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these parameters of a model require gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def _known_up_to(blocks: nn.ModuleList, output: Any) -> Iterator[None]:
    """Blocks that return an output that is known, without computing."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, lambda *args, **kwargs: output))
        yield


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 and parameter.is_floating_point()


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count` in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
