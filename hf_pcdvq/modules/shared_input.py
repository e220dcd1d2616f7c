"""Layers with a common input prepare it once: query, key and value, or gate and up.

Before a product with packed weights, its kernel's activations are rotated and put in order, by a launch of its own. A
module that calls several packed layers with the same tensor needs that launch only once.
"""

from __future__ import annotations

from typing import Any

import hf_pcdvq_kernels as ops
import torch
from torch import Tensor, nn


class SharedInput:
    """What packed layers of one module, of one codec and one number of inputs, remember of their last input.

    Which of them get the same input is seen when they do: it is then the very same tensor. Nothing outlives a call of the
    module around them, so that a CUDA graph of it holds all that it needs, and no activations stay in memory. What a
    module writes into its input between two layers is noticed where PyTorch counts changes, which it does neither in
    inference mode nor compiled; and its layers are expected to run on one stream. No model is known to do otherwise.

    Args:
        parent: the module that calls the layers.
        format: of their packed weights, see `Codec.format`.
    """

    def __init__(self, parent: nn.Module, format: str):
        self._format = format
        # While the module runs, the last input, its version and what was made of it, or nothing yet; None outside.
        self._last: tuple[Any, ...] | None = None
        # `always_call`: also after an exception, by which checkpointing ends what it computes again.
        end = parent.register_forward_hook(self._end, always_call=True)
        self._hooks = [parent.register_forward_pre_hook(self._begin), end]

    def prepared(self, x: Tensor, signs: Tensor | None) -> Tensor | None:
        """What `hf_pcdvq_kernels.prepare` makes of `x` `[..., K]`; None outside the module."""
        last = self._last  # read once: another thread may run the same module
        if last is None:
            return None
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if not last or last[0] is not x or last[1] != version:
            last = self._last = (x, version, ops.prepare(x, signs, self._format))
        return last[2]

    def remove(self) -> None:
        """Take the hooks off the module."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._last = ()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = None
