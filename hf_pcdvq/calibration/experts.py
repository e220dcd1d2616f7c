"""Quantizing fused experts, each with the moments of the tokens that are routed to it.

The routing of the model quantized so far is applied to the original's hidden states too, so that both can be compared
token by token. Only one expert's moments are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..codecs.base import Codec, Packed
from ..modules import STACKS, stack_packed
from .hessian import InputMoments
from .inputs import Stop
from .layers import quantize_layers
from .records import LayerRecord
from .settings import OWN_SHARE, Calibration

_CHUNK = 1 << 13  # tokens whose activations are computed at a time


@dataclass(frozen=True)
class RoutedTokens:
    """The input of a layer's experts.

    Attributes:
        hidden: hidden states of all tokens, `[T, H]`, on the CPU.
        original: the same tokens in the original model; None if they were not stored.
        index: the experts of every token, int64 `[T, k]`.
    """

    hidden: Tensor
    original: Tensor | None
    index: Tensor

    def of(self, expert: int) -> RoutedTokens:
        """The tokens that are routed to one expert."""
        return self.chosen((self.index == expert).any(1).nonzero()[:, 0])

    def chosen(self, token: Tensor) -> RoutedTokens:
        """The tokens with these numbers, int64 `[t]`."""
        original = None if self.original is None else self.original[token]
        return RoutedTokens(self.hidden[token], original, self.index[token])


def routed_tokens(
    experts: nn.Module, windows: Iterable[int], forward: Callable[[int], Tensor], originals: list[Tensor | None]
) -> RoutedTokens:
    """Run a block up to its experts, for all windows.

    Args:
        experts: the dense module.
        windows: numbers of the windows.
        forward: runs the block for a window.
        originals: what the experts receive in the original model, window by window.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("hidden_states", "top_k_index"), args)) | kwargs
        calls.append((named["hidden_states"].cpu(), named["top_k_index"].cpu()))
        raise Stop

    handle = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for window in windows:
            with suppress(Stop):
                forward(window)
    finally:
        handle.remove()
    hidden, index = (torch.cat(parts) for parts in zip(*calls))
    kept = None if any(tensor is None for tensor in originals) else torch.cat(originals)
    return RoutedTokens(hidden, kept, index)


def quantize_experts(
    name: str, experts: nn.Module, tokens: RoutedTokens | None, codec: Codec, settings: Calibration
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Quantize all experts of a layer; the dense module is not changed.

    An expert that received fewer than `settings.expert_tokens` tokens is calibrated on all tokens of the layer
    instead, and its records say so.

    Args:
        name: of the module.
        experts: the dense module, on the device to compute on.
        tokens: None if the layer did not run; its weights are then rounded to the nearest codes.

    Returns:
        The packed stacks by parameter, and two records for each expert.

    Raises:
        ValueError: a weight is not finite.
    """
    packed: dict[str, list[Packed]] = {stack: [] for stack in STACKS}
    records: list[LayerRecord] = []
    up, down = STACKS
    for expert, weights in enumerate(zip(getattr(experts, up).detach(), getattr(experts, down).detach())):
        own, note = _tokens_of(expert, tokens, settings)
        inputs_of: Callable[[Tensor, bool], Tensor] = _unchanged
        for stack, weight in zip(STACKS, weights):
            matrix = f"{name}.{expert}.{stack}"
            moments = _moments(own, weight.device, inputs_of, settings.correction == OWN_SHARE)
            tensors, (record,) = quantize_layers({matrix: weight}, moments, codec, settings)
            packed[stack].append(tensors[matrix])
            records.append(replace(record, note="; ".join(filter(None, (note, record.note))) or None))
            if stack == up:
                inputs_of = _gated(experts, weight, codec, tensors[matrix])
    return {stack: stack_packed(parts) for stack, parts in packed.items()}, records


def _tokens_of(
    expert: int, tokens: RoutedTokens | None, settings: Calibration
) -> tuple[RoutedTokens | None, str | None]:
    """The tokens to calibrate an expert on, and a note if it received too few."""
    if tokens is None or settings.all_experts:
        return tokens, None
    own = tokens.of(expert)
    if len(own.hidden) >= settings.expert_tokens:
        return own, None
    return tokens, f"only {len(own.hidden)} tokens were routed to it: calibrated on all tokens of the layer"


def _unchanged(hidden: Tensor, original: bool) -> Tensor:
    return hidden


def _gated(experts: nn.Module, dense: Tensor, codec: Codec, packed: Packed) -> Callable[[Tensor, bool], Tensor]:
    """Computes the input of an expert's down projection, with the dense weight for the original, else the packed one."""
    tables = {key: table.to(dense.device) for key, table in codec.tables(dense.shape[1]).items()}
    decoded = codec.decode(packed, tables, dense.dtype)
    return lambda hidden, original: experts._apply_gate(functional.linear(hidden, dense if original else decoded))


def _moments(
    tokens: RoutedTokens | None,
    device: torch.device,
    inputs_of: Callable[[Tensor, bool], Tensor],
    with_change: bool,
) -> InputMoments | None:
    """Moments of the inputs that `inputs_of` computes from hidden states and whether they are the original's."""
    if tokens is None:
        return None
    moments = None
    for start in range(0, len(tokens.hidden), _CHUNK):
        rows = slice(start, start + _CHUNK)
        found = inputs_of(tokens.hidden[rows].to(device), False)
        before = None if tokens.original is None else inputs_of(tokens.original[rows].to(device), True)[None]
        moments = moments or InputMoments(found.shape[1], device, with_change)
        moments.add(found[None], before)
    return moments
