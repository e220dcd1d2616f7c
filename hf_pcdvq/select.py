"""Decides which layers are packed, and records why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from .codecs.base import Codec, counted_bits
from .modules import dense_weights, experts_obstacle, is_fused_experts
from .modules.tied import tied_to
from .weight_readers import read_layers


def _spellings(name: str, base_prefix: str) -> tuple[str, ...]:
    """A module's name as `AutoModelForCausalLM` and as `AutoModel` know it."""
    if not base_prefix:
        return (name,)
    return name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}.")


def matches(name: str, patterns: list[str], base_prefix: str) -> bool:
    """Whether a pattern matches the module: as a prefix at a module boundary, a regular expression or a suffix."""
    return any(not should_convert_module(spelling, patterns) for spelling in _spellings(name, base_prefix))


def select_layers(
    model: nn.Module,
    codec_of: Callable[[str], Codec | None],
    skip: list[str],
    only: list[str] | None,
    tied: set[str],
    base_prefix: str,
    added: dict[str, str],
    vocabulary: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Decide which layers of a model are packed.

    Args:
        model: the model, possibly on the meta device.
        codec_of: returns the codec of a module by name, which restricts the number of inputs, or None not to pack it.
        skip: patterns of modules not to pack.
        only: patterns of the modules to pack, or None for all; if given, `skip` is ignored.
        tied: names of parameters that share their storage with another.
        base_prefix: name of the base model's attribute, which `AutoModel` strips from names.
        added: reasons not to pack modules and all that they contain, by name: see `added_modules`.
        vocabulary: embeddings and heads that are packed whatever the others say.

    Returns:
        The names of the layers to pack, in model order, and a dictionary from the parameters with two or more
        dimensions that are not packed, with layer numbers folded to `*`, to the reason.

    Raises:
        ValueError: `only` names a module that cannot be packed, or one of its patterns matches none that can.
    """
    packed: list[str] = []
    reasons: dict[str, str] = {}
    routers, read = _routers(model), read_layers(model)
    packed_with = {other for name in vocabulary for other in tied_to(model, name)}
    for name, module in model.named_modules():
        matrices = [key for key, tensor in module.named_parameters(name, recurse=False) if tensor.ndim > 1]
        if not matrices or name in packed_with:
            continue
        if name in vocabulary:
            packed.append(name)
            continue
        codec = codec_of(name)
        if tied.intersection(matrices):
            reason = "tied to another weight"
        elif module in routers:
            reason = "router of experts"
        elif module in read:
            reason = read[module]
        else:
            reason = "left alone by overrides" if codec is None else _obstacle(module, codec)
        if reason and only and set(only).intersection(_spellings(name, base_prefix)):
            raise ValueError(f"modules_to_convert asks for {name!r}, which cannot be packed: {reason}")
        if only is not None and not matches(name, only, base_prefix):
            reason = reason or "not in modules_to_convert"
        elif only is None and matches(name, skip, base_prefix):
            reason = reason or "in modules_to_not_convert"
        owner = next((owner for owner in added if f"{name}.".startswith(f"{owner}.")), None)
        if owner is not None:
            reason = reason or added[owner]
        if reason:
            reasons.update(dict.fromkeys(matrices, reason))
        else:
            packed.append(name)
    for pattern in only or ():
        if not any(matches(name, [pattern], base_prefix) for name in packed):
            raise ValueError(f"modules_to_convert: {pattern!r} matches no layer that can be packed")
    return packed, _fold(reasons)


def added_modules(model: nn.Module) -> dict[str, str]:
    """What the class of a model, or of a model inside it, adds to its base model: heads that were trained for a task.

    Returns:
        Reasons not to pack them, by name. Packing the base model leaves them alone whatever they are called.
    """
    added: dict[str, str] = {}
    for path, part in model.named_modules():
        base = getattr(part, getattr(part, "base_model_prefix", "") or "-", None)
        if isinstance(base, nn.Module):
            reason = f"{type(part).__name__} adds it to its base model"
            names = [name for name, child in part.named_children() if child is not base]
            added.update({f"{path}.{name}".removeprefix("."): reason for name in names})
    return added


def check_packable(name: str, module: nn.Module, codec: Codec, tied: set[str]) -> None:
    """Check that a module of a model can hold the packed weight that a file has for it.

    Args:
        name: its name.
        module: a dense module.
        codec: the format in the file.
        tied: names of parameters that share their storage with another.

    Raises:
        ValueError: it cannot; the message says why.
    """
    shared = tied.intersection(key for key, _ in module.named_parameters(name, recurse=False))
    obstacle = "the model ties it to another weight" if shared else _obstacle(module, codec)
    if obstacle:
        raise ValueError(
            f"the file holds a packed weight ({codec.format}) for {name}, which cannot be packed in this model: {obstacle}"
        )


def _routers(model: nn.Module) -> set[nn.Module]:
    """Linear layers that route to experts: those of a sibling module of the experts whose last linear layer has one
    output per expert, or a single output, as for a shared expert."""
    routers: set[nn.Module] = set()
    for parent in model.modules():
        numbers = {child: _number_of_experts(child) for child in parent.children()}
        experts = set(numbers.values()) - {None}
        for sibling in [child for child, number in numbers.items() if experts and number is None]:
            linear = [module for module in sibling.modules() if isinstance(module, nn.Linear)]
            if linear and linear[-1].out_features in {1, *experts}:
                routers.update(linear)
    return routers


def _number_of_experts(module: nn.Module) -> int | None:
    """Number of experts that a module may hold, as stacks of weights or as modules; None if it holds none."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):  # their weights are also three-dimensional
        return None
    return next((len(tensor) for tensor in module.parameters(recurse=False) if tensor.ndim == 3), None)


def _obstacle(module: nn.Module, codec: Codec) -> str | None:
    """Why a module cannot be packed, or None if it can."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_fused_experts(module):
        obstacle = experts_obstacle(module)
        if obstacle:
            return f"experts that cannot be packed: {obstacle}"
    elif type(module) is not nn.Linear:
        shapes = [list(tensor.shape) for tensor in module.parameters(recurse=False) if tensor.ndim > 1]
        return f"{type(module).__name__} {shapes} is not nn.Linear"
    return next(filter(None, (weight_obstacle(weight, codec) for weight in dense_weights(module).values())), None)


def weight_obstacle(weight: nn.Parameter, codec: Codec) -> str | None:
    """Why a weight, or a stack of them, cannot be packed, or None if it can."""
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"weights are {weight.dtype}"
    if not weight.numel():
        return f"it is empty: {list(weight.shape)}"
    *_, outputs, inputs = weight.shape
    if inputs % codec.multiple:
        return f"{inputs} input features are not a multiple of {codec.multiple}"
    bits = counted_bits(codec.specs(outputs, inputs), outputs, inputs)
    if bits >= 8 * weight.dtype.itemsize:
        return f"packed, {outputs} output features would take {bits:.1f} bits per weight"
    return None


def _fold(reasons: dict[str, str]) -> dict[str, str]:
    """`{"model.layers.0.x.weight": why, "model.layers.1.x.weight": why}` -> `{"model.layers.*.x.weight": "why (x2)"}`."""
    counts = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), why) for name, why in reasons.items())
    folded: dict[str, str] = {}
    for (name, why), count in counts.items():
        entry = why if count == 1 else f"{why} (x{count})"
        folded[name] = f"{folded[name]}; {entry}" if name in folded else entry
    return folded
