"""Quantizing fused experts, each with the moments of the tokens that are routed to it.

The routing of the model quantized so far is applied to the original's hidden states too, so that both can be compared
token by token. Only one expert's moments are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..codecs.base import Codec, Packed
from ..modules import STACKS, stack_packed
from ..processes import Processes
from .activations import Activations
from .hessian import InputMoments
from .inputs import Stop
from .layers import quantize_layers
from .records import LayerRecord
from .settings import OWN_SHARE, Calibration

_CHUNK = 1 << 13  # tokens whose activations are computed at a time
_KEPT = ("hidden", "original")


@dataclass(frozen=True)
class RoutedTokens:
    """The input of a layer's experts.

    Attributes:
        index: the experts of every token, int64 `[T, k]`.
        kept: "hidden", the hidden states of the tokens, `[T, H]`; and "original", the same in the original
            model, if they were stored.
    """

    index: Tensor
    kept: Activations | dict[str, Tensor]

    def of_all(self, processes: Processes, activations: Callable[[], Activations]) -> RoutedTokens:
        """Those of all processes in the order of their numbers, which is that of the windows, in each of them."""
        if processes.count == 1:
            return self
        index, kept = torch.cat(list(processes.chain([self.index]))), activations()
        for name in _KEPT:
            if all(known for _, known in processes.gather({}, name in self.kept)):
                own = self.kept[name]  # read once
                kept.join(name, processes.chain(own[start : start + _CHUNK] for start in range(0, len(own), _CHUNK)))
        return RoutedTokens(index, kept)

    def of(self, expert: int) -> RoutedTokens:
        """The tokens that are routed to one expert."""
        return self.chosen((self.index == expert).any(1).nonzero()[:, 0])

    def chosen(self, token: Tensor) -> RoutedTokens:
        """The tokens with these numbers, int64 `[t]`."""
        kept = {name: self.kept[name][token] for name in _KEPT if name in self.kept}
        return RoutedTokens(self.index[token], kept)


def routed_tokens(
    experts: nn.Module, batches: Iterable[int], forward: Callable[[int], Tensor], kept: Activations
) -> RoutedTokens:
    """Run a block up to its experts, for all windows.

    Args:
        experts: the dense module.
        batches: numbers of the batches of windows.
        forward: runs the block for a batch.
        kept: receives the hidden states.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    index: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("hidden_states", "top_k_index"), args)) | kwargs
        calls.append((named["hidden_states"], named["top_k_index"].cpu()))
        raise Stop

    def hidden() -> Iterator[Tensor]:
        for batch in batches:
            with suppress(Stop):
                forward(batch)
            while calls:
                states, chosen = calls.pop(0)
                index.append(chosen)
                yield states

    handle = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        kept.join("hidden", hidden())
    finally:
        handle.remove()
    return RoutedTokens(torch.cat(index), kept)


def quantize_experts(
    name: str,
    experts: nn.Module,
    tokens: RoutedTokens | None,
    codec: Codec,
    settings: Calibration,
    processes: Processes | None = None,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Quantize all experts of a layer; the dense module is not changed.

    An expert that received fewer than `settings.expert_tokens` tokens is calibrated on all tokens of the layer
    instead, and its records say so.

    Args:
        name: of the module.
        experts: the dense module, on the device to compute on.
        tokens: None if the layer did not run; its weights are then rounded to the nearest codes.
        processes: those that share the experts, all of which pass the same; None: this one quantizes all.

    Returns:
        The packed stacks by parameter, and two records for each expert.

    Raises:
        ValueError: a weight is not finite.
    """
    processes = processes or Processes.alone()
    packed: dict[str, list[Packed]] = {stack: [] for stack in STACKS}
    records: list[LayerRecord] = []
    up, down = STACKS
    for expert in processes.share(range(len(getattr(experts, up)))):
        weights = getattr(experts, up)[expert].detach(), getattr(experts, down)[expert].detach()
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
    stacks = {stack: stack_packed(parts) for stack, parts in packed.items() if parts}
    return _joined(stacks, records, processes)


def _joined(
    stacks: dict[str, Packed], records: list[LayerRecord], processes: Processes
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """The stacks and records of all processes, in each of them; a process without experts passes nothing."""
    if processes.count == 1:
        return stacks, records
    own = {(stack, suffix): tensor for stack, packed in stacks.items() for suffix, tensor in packed.items()}
    found = processes.gather(own, records)
    parts = [tensors for tensors, _ in found if tensors]
    joined: dict[str, Packed] = {stack: {} for stack in STACKS}
    for stack, suffix in parts[0]:
        joined[stack][suffix] = torch.cat([part[stack, suffix] for part in parts])
    return joined, [record for _, some in found for record in some]


def _tokens_of(
    expert: int, tokens: RoutedTokens | None, settings: Calibration
) -> tuple[RoutedTokens | None, str | None]:
    """The tokens to calibrate an expert on, and a note if it received too few."""
    if tokens is None or settings.all_experts:
        return tokens, None
    own = tokens.of(expert)
    if len(own.index) >= settings.expert_tokens:
        return own, None
    return tokens, f"only {len(own.index)} tokens were routed to it: calibrated on all tokens of the layer"


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
    for start in range(0, len(tokens.index), _CHUNK):
        rows = slice(start, start + _CHUNK)
        found = inputs_of(tokens.kept["hidden"][rows].to(device), False)
        known = "original" in tokens.kept
        before = inputs_of(tokens.kept["original"][rows].to(device), True)[None] if known else None
        moments = moments or InputMoments(found.shape[1], device, with_change)
        moments.add(found[None], before)
    return moments
