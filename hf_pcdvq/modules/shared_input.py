"""Layers with a common input prepare it only once: query, key and value, or gate and up.

Before a product with packed weights, a separate kernel launch rotates and reorders the activations. A module that
calls several packed layers with the same tensor needs that launch only once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hf_pcdvq_kernels as ops
import torch
from torch import Tensor, nn


class SharedInput:
    """Caches the prepared input of packed layers in one module that have the same codec and number of inputs.

    Layers share an input if they are called with the very same tensor object. Nothing is kept beyond a call of the
    enclosing module, so a CUDA graph of it is self-contained and no activations stay in memory. In-place writes to
    the input between two layers are detected by its version counter, which is not available in inference mode or when
    compiled; and the layers are expected to run on one stream. No model is known to violate this.

    Args:
        parent: the module that calls the layers.
    """

    def __init__(self, parent: nn.Module):
        # During a call of the module: the last input, its version and its prepared form, or empty; None outside.
        self._last: tuple[Any, ...] | None = None
        if not hasattr(parent, "_shared_inputs"):
            # `always_call`: also after an exception, which checkpointing uses to stop recomputation early. The handles
            # belong to the parent, and are copied and saved with its hooks: the layers may be moved elsewhere.
            end = parent.register_forward_hook(_end, always_call=True)
            parent._shared_inputs, parent._shared_input_hooks = (), (parent.register_forward_pre_hook(_begin), end)
        parent._shared_inputs = (*parent._shared_inputs, self)

    def prepared(self, x: Tensor, prepare: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """The result of `prepare` for `x` `[..., K]`; None outside a call of the module."""
        last = self._last  # read once: another thread may run the same module
        if last is None:
            return None
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if not last or last[0] is not x or last[1] != version:
            last = self._last = (x, version, prepare(x))
        return last[2]


class _Traced:
    """The last input while `torch.compile` traces, as in `SharedInput`, with what it was prepared for in place of a version.

    One for all modules: `torch.compile` checks at every call that the objects which several layers refer to are still
    the same, and for those of all modules that takes longer than the products of a small model.
    """

    last: tuple[Any, ...] | None = None


_TRACED = _Traced()


def prepared_when_traced(x: Tensor, signs: Tensor | None, format: str, rotation: str) -> Tensor | None:
    """`SharedInput.prepared`, for `torch.compile` to trace; `rotation` tells apart signs, which tensors would not."""
    last = _TRACED.last
    if last is None:
        return None
    if not last or last[0] is not x or last[1] != format or last[2] != rotation:
        last = _TRACED.last = (x, format, rotation, ops.prepare(x, signs, format))
    return last[3]


def _begin(module: nn.Module, args: Any) -> None:
    # True in what is traced, and only there; `is_compiling` is true in all threads while one of them compiles.
    if torch.compiler.is_dynamo_compiling():
        _TRACED.last = ()
        return
    for shared in module._shared_inputs:
        shared._last = ()


def _end(module: nn.Module, args: Any, output: Any) -> None:
    _TRACED.last = None
    if not torch.compiler.is_dynamo_compiling():
        for shared in module._shared_inputs:
            shared._last = None


def unshare_inputs(model: nn.Module) -> None:
    """Remove the hooks of all shared inputs from a model, whose layers are no longer packed."""
    for module in model.modules():
        vars(module).pop("_shared_inputs", None)
        for hook in vars(module).pop("_shared_input_hooks", ()):
            hook.remove()
