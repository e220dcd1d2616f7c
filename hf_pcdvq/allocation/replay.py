"""The original model, run again from any of its decoder blocks on, to see what an error in that block does to its logits.

The outputs of all blocks and the predictions are computed once and kept, in float32: an error in one group of layers
changes the predictions by a few thousandths of a nat, which is what rounding to bfloat16 alone makes of them. A block before
the one that is changed returns what it returned then, without computing; the model's own forward pass does the rest, so that
nothing here depends on the architecture.

Kept are, for `T` tokens and `B` blocks, `B T D + T V` numbers, with hidden states of `D` and a vocabulary of `V`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import streamed

_LOGITS = 512 << 20  # bytes of logits at a time


class Replay:
    """The predictions of a model on some windows, and its runs from one of its blocks on.

    Args:
        model: the dense model, without dropout.
        prefix: name of its list of decoder blocks.
        windows: token ids int64 `[n, L]`.
        device: where the blocks are computed.

    Raises:
        ValueError: logits of the model are NaN or infinite, other than -inf for tokens that it rules out.
    """

    def __init__(self, model: nn.Module, prefix: str, windows: Tensor, device: torch.device):
        self._model, self._blocks, self._device = model, model.get_submodule(prefix), device
        vocabulary = model.get_output_embeddings().weight.shape[0]
        at_a_time = max(1, _LOGITS // (4 * vocabulary * windows.shape[1]))
        self._batches = windows.split(at_a_time)
        self._outputs: list[list[Any]] = [[] for _ in self._batches]  # of every block, for each batch
        self._predictions: list[Predictions] = []
        self._current = self._start = 0
        with self.running():
            self._predictions = [Predictions(self._logits(number, 0)) for number in range(len(self._batches))]
        if not all(predictions.finite for predictions in self._predictions):
            raise ValueError(f"the logits of {type(model).__name__} are NaN or infinite; the checkpoint is damaged")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ready to run: in float32, and with the blocks on the device. Weights may be exchanged meanwhile."""
        with torch.no_grad(), streamed(self._model, self._blocks, self._device, True, self._around):
            yield

    def divergence(self, start: int) -> float:
        """Mean KL(original || model as it is now) in nats, if nothing before block `start` has changed.

        Infinite or NaN if logits of the model as it is now are.
        """
        parts = [
            self._predictions[number].divergence(self._logits(number, start)) for number in range(len(self._batches))
        ]
        return torch.cat(parts).mean().clamp(min=0).item()  # which leaves NaN as it is

    def _logits(self, batch: int, start: int) -> Tensor:
        """Logits `[n L, vocabulary]` of a batch."""
        self._current, self._start = batch, start
        home = self._model.get_input_embeddings().weight.device
        return self._model(input_ids=self._batches[batch].to(home), use_cache=False).logits.flatten(0, 1).float()

    def _around(self, number: int, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            kept = self._outputs[self._current]
            if number < min(self._start, len(kept)):
                return kept[number]
            output = forward(*args, **kwargs)
            if number == len(kept):  # the first run, of the original
                kept.append(output)
            return output

        return run


class Predictions:
    """Distributions of the next token, float32, from logits `[P, V]`."""

    def __init__(self, logits: Tensor):
        logs = logits.log_softmax(-1)
        self._probabilities = logs.exp()
        # Tokens of probability 0 contribute nothing, whatever their logarithms.
        self._negative_entropy = (logs.masked_fill_(self._probabilities == 0, 0) * self._probabilities).sum(-1)

    @property
    def finite(self) -> bool:
        """Whether they are distributions; not if a logit is NaN or inf."""
        return bool(self._negative_entropy.isfinite().all())

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(these || those of other logits `[P, V]`) in nats, float64 `[P]` on the CPU."""
        # About their mean under these probabilities, so that the sum has no large terms that cancel.
        possible = logits.masked_fill(self._probabilities == 0, 0)  # of 0 times infinity, which is 0 here
        expected = torch.linalg.vecdot(self._probabilities, possible)
        rest = (logits - expected[:, None]).logsumexp(-1)
        return (self._negative_entropy + rest).double().cpu()
