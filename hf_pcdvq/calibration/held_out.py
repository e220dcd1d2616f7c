"""Comparing a quantized model with what it was before, on windows held out of its calibration data.

Both models run whole, from tokens to logits, each in the state in which it is used; only where decoder blocks are
computed may differ. Nothing that the calibration knows of the hidden states is used, so the figures are those of the two
models even where layers outside the blocks are packed.

The logits of the original are kept in the meantime, where activations are and in the dtype in which the model returns
them: `m (L - 1) vocabulary` numbers for `m` windows of `L` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..evaluation.metrics import Evaluation, compare_logits
from ..processes import Processes
from ..progress import progress_of
from .activations import Activations
from .blocks import NotBlockByBlock
from .report import QuantizationReport
from .weights import ModelWeights

logger = logging.getLogger(__name__)


class HeldOut:
    """Windows held out of the calibration data, and the logits of the original on them.

    Args:
        weights: of the dense model, which has an output head.
        blocks: name of its list of decoder blocks.
        windows: token ids int64 `[m, L]`, m >= 1.
        device: where the blocks are computed.
        activations: makes what the logits are kept in.
        progress: show the progress.
        processes: those that share the windows; only the first can compare.

    Raises:
        NotImplementedError: see `ModelWeights.logits`.
    """

    def __init__(
        self,
        weights: ModelWeights,
        blocks: str,
        windows: Tensor,
        device: torch.device,
        activations: Callable[[], Activations],
        progress: bool,
        processes: Processes | None = None,
    ):
        processes = processes or Processes.alone()
        self._blocks, self._windows, self._device, self._progress = blocks, windows, device, progress
        self._logits = activations()
        share = processes.share(windows)
        bar = progress_of(total=len(share), desc="Running the original", unit="window", shown=progress)
        failure = None
        with bar, self._running(weights.model):
            try:
                for number, logits in enumerate(weights.logits(blocks, share, device) if len(share) else ()):
                    self._logits[number] = logits.cpu()
                    bar.update()
            except NotBlockByBlock as error:
                failure = str(error)
        failures = [failure for _, failure in processes.gather({}, failure) if failure is not None]
        if failures:  # in any process: all must know
            raise NotBlockByBlock(failures[0])
        if processes.count > 1:
            own, self._logits = self._logits, activations()
            for number, logits in enumerate(processes.chain(own[number] for number in range(len(own)))):
                if processes.rank == 0:
                    self._logits[number] = logits

    def compare(self, weights: ModelWeights) -> Evaluation:
        """Compare the model, which has been quantized in the meantime, with the original.

        Raises:
            ValueError: logits are NaN.
        """
        with self._running(weights.model):
            found = weights.logits(self._blocks, self._windows, self._device)
            pairs = ((self._logits[number], logits) for number, logits in enumerate(found))
            return compare_logits(pairs, self._windows, self._progress)

    @contextmanager
    def _running(self, model: nn.Module) -> Iterator[None]:
        """Ready to compute logits, without dropout."""
        training = model.training
        model.eval()
        try:
            # Not inference mode, in which blocks that are moved would turn into inference tensors for good.
            with torch.no_grad():
                yield
        finally:
            model.train(training)


def with_comparison(
    report: QuantizationReport, weights: Callable[[], ModelWeights], held_out: HeldOut | None
) -> QuantizationReport:
    """The report with the comparison of a quantized model with its original.

    The comparison is no part of the result: if it fails, whatever the reason, a warning and the report say so.

    Args:
        weights: finds those of the quantized model.
        held_out: None if there is nothing to compare on.
    """
    if held_out is None:
        return report
    try:
        return replace(report, comparison=held_out.compare(weights()))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning(
            "the model is quantized, but comparing it with its original failed: %s. "
            "Once it is saved, `hf-pcdvq eval` measures it",
            reason,
        )
        return replace(report, comparison_failure=reason)
