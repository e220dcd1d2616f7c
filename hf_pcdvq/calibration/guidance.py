"""How sensitive a model's predictions are to the outputs of its layers, token by token (GuidedQuant, arXiv 2505.07004).

An error `e x` in a layer's outputs changes the loss of the model by about half its product with the loss's curvature, for
which the Fisher information stands in: the square of the gradient. With labels drawn from the model's own predictions,
that is `mean over the tokens of g^2 (e x)^2` for the gradient `g` with respect to an output channel, so the channel's
Hessian is `mean of g^2 x x^T`. A Hessian for every channel would be too many: the channels are divided into a few groups
of adjacent ones, and `g^2` is averaged over a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..emulation import is_emulated, placed
from ..progress import progress_of
from .blocks import replaced_forward
from .hessian import group_sizes

Sensitivity = dict[str, Tensor]  # float32 [windows, L, groups] on the CPU, by the name of the layer


def output_sensitivity(
    model: nn.Module,
    blocks: str,
    names: list[str],
    windows: Tensor,
    groups: int,
    seed: int,
    *,
    device: torch.device,
    progress: bool,
) -> Sensitivity:
    """For every token the squared gradient of the loss with respect to a layer's outputs, averaged over groups of channels.

    One forward and one backward pass of the whole model for every window. The activations of one block are kept at a time;
    the model itself must fit the device.

    Args:
        model: a dense causal language model on one device.
        blocks: name of its list of decoder blocks.
        names: linear layers. Those that do not see every token in its place, such as experts, are left out.
        windows: token ids int64 `[n, L]`.
        groups: of output channels, as equal in size as they can be; no more than a layer has.
        seed: of the labels.
        device: where to compute.
        progress: show the progress.

    Returns:
        Sensitivities by layer, in units of the layer's mean.
    """
    layers = {name: model.get_submodule(name) for name in names}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(seed)
    upcast = is_emulated(next(model.parameters()).dtype, device)
    with ExitStack() as stack:
        stack.enter_context(placed(model, device, upcast))
        stack.enter_context(_frozen(model))
        for block in model.get_submodule(blocks):
            stack.enter_context(replaced_forward(block, _recomputed(block.forward)))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_recorder(found[name], groups)).remove)
        for window in progress_of(windows, desc="Sensitivity of the original", unit="window", shown=progress):
            _backward(model, window[None].to(device), generator)
    result: Sensitivity = {}
    for name in layers:  # one layer after the other: together they may take much memory
        parts = found.pop(name)
        if [len(part) for part in parts] == [windows.shape[1]] * len(windows):
            squares = torch.stack(parts)
            result[name] = squares.div_(squares.mean().clamp(min=torch.finfo(torch.float32).tiny))
    return result


def _backward(model: nn.Module, ids: Tensor, generator: torch.Generator) -> None:
    """One backward pass of the loss on labels that are drawn from the predictions."""
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        cumulative = logits.detach().softmax(-1).cumsum(-1)
        uniform = 1 - torch.rand(len(logits), 1, generator=generator).to(
            logits.device
        )  # above 0, as in `sampling.py`
        labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


def _recorder(parts: list[Tensor], groups: int) -> Callable:
    """A forward hook that has the backward pass add `[tokens, groups]` to `parts`."""

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        def square(gradient: Tensor) -> None:
            channels = gradient.detach().flatten(0, -2).float().square().split(sizes, -1)
            parts.append(torch.stack([part.mean(-1) for part in channels], -1).cpu())

        sizes = group_sizes(output.shape[-1], groups)
        if output.ndim == 3 and output.requires_grad:
            output.register_hook(square)

    return record


def _recomputed(forward: Callable) -> Callable:
    """A forward pass whose activations are computed again in the backward pass."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters; those of activations begin at the input embeddings."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
