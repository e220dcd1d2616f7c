"""Comparing a quantized model with what it was before, on windows held out of its calibration data.

Both models run whole, from tokens to logits, each in the state in which it is used; only where decoder blocks are
computed may differ. Nothing that the calibration knows of the hidden states is used, so the figures are those of the two
models even where layers outside the blocks are packed.

The logits of the original are kept in the meantime, on the CPU and in the dtype in which the model returns them:
`m (L - 1) vocabulary` numbers for `m` windows of `L` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..emulation import is_emulated
from ..evaluation.metrics import Evaluation, compare_logits, window_logits
from .blocks import streamed
from .report import QuantizationReport

logger = logging.getLogger(__name__)


class HeldOut:
    """Windows held out of the calibration data, and the logits of the original on them.

    Args:
        model: the dense model, on one device, with an output head.
        blocks: name of its list of decoder blocks.
        windows: token ids int64 `[m, L]`, m >= 1.
        device: where the blocks are computed.
        progress: show progress bars.
    """

    def __init__(self, model: nn.Module, blocks: str, windows: Tensor, device: torch.device, progress: bool):
        self._blocks, self._windows, self._device, self._progress = blocks, windows, device, progress
        bar = tqdm(windows, desc="Running the original", unit="window", disable=not progress)
        with self._running(model):
            self._logits = [window_logits(model, window).cpu() for window in bar]

    def compare(self, model: nn.Module) -> Evaluation:
        """Compare the model, which has been quantized in the meantime, with the original.

        Raises:
            ValueError: logits are NaN.
        """
        with self._running(model):
            pairs = (
                (original, window_logits(model, window)) for original, window in zip(self._logits, self._windows)
            )
            return compare_logits(pairs, self._windows, self._progress)

    @contextmanager
    def _running(self, model: nn.Module) -> Iterator[None]:
        """Ready to compute logits: without dropout, and with its blocks on the device."""
        training = model.training
        model.eval()
        upcast = is_emulated(model.dtype, self._device)
        blocks = model.get_submodule(self._blocks)
        try:
            # Not inference mode, in which blocks that are moved would turn into inference tensors for good.
            with torch.no_grad(), streamed(model, blocks, self._device, upcast):
                yield
        finally:
            model.train(training)


def with_comparison(report: QuantizationReport, model: nn.Module, held_out: HeldOut | None) -> QuantizationReport:
    """The report with the comparison of a quantized model with its original.

    The comparison is no part of the result: if it fails, whatever the reason, a warning and the report say so.

    Args:
        held_out: None if there is nothing to compare on.
    """
    if held_out is None:
        return report
    try:
        return replace(report, comparison=held_out.compare(model))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning(
            "the model is quantized, but comparing it with its original failed: %s. "
            "Once it is saved, `hf-pcdvq eval` measures it",
            reason,
        )
        return replace(report, comparison_failure=reason)
