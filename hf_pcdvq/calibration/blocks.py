"""A model as a sequence of decoder blocks: which they are, how they are called, and the hidden states between them.

Nothing here depends on the architecture. The blocks are the outermost `nn.ModuleList` that holds most of the layers
to quantize, in the part of the model that the input embeddings belong to. What a block is called with besides the hidden
states (masks, positions, rotary embeddings) is recorded from the model's own forward pass; it must not depend on the
text, and every block must run once, in the order of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..emulation import placed, to_device
from .activations import Activations
from .inputs import Stop


class NotBlockByBlock(NotImplementedError):
    """A model cannot be run one decoder block at a time; the message says why. PyTorch raises its base for other reasons."""


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """All arguments, positional ones by their position."""
        return {**{str(number): value for number, value in enumerate(self.args, 1)}, **self.kwargs}

    def to(self, device: torch.device, upcast: bool) -> Call:
        """With its tensors on `device`; with `upcast`, 16-bit floats become float32."""
        return Call(_to_device(self.args, device, upcast), _to_device(self.kwargs, device, upcast))


def find_blocks(model: nn.Module, layers: list[str]) -> str:
    """Name of the list of decoder blocks.

    A model with a tower for images may have most of its layers there. The blocks that text passes through are found from
    the input embeddings: they belong to the smallest module that holds both.

    Raises:
        ValueError: no `nn.ModuleList` of the model holds any of the layers.
        NotImplementedError: the model has an encoder and a decoder, which read different inputs.
    """
    two_stacks = any({"encoder", "decoder"} <= dict(module.named_children()).keys() for module in model.modules())
    if two_stacks and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} has an encoder and a decoder: calibration runs one list of blocks on text. Quantize it "
            "without calibration"
        )
    counts = {
        name: sum(layer.startswith(f"{name}.") for layer in layers)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    around = embeddings_name(model)
    while True:
        around = around.rpartition(".")[0]
        inside = [name for name, count in counts.items() if count and name.startswith(around and f"{around}.")]
        if inside:  # the outer list comes first, and an inner one never holds more
            return max(inside, key=counts.__getitem__)
        if not around:
            raise ValueError(
                f"{type(model).__name__} has no list of decoder blocks; calibration works block by block"
            )


def embeddings_name(model: nn.Module) -> str:
    """The name of the input embeddings."""
    embeddings = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is embeddings), "")


def refuse_shared(model: nn.Module, prefix: str, layers: list[str]) -> None:
    """Reject a layer that stands in several places of the list of blocks: its inputs would be those of the first alone.

    Raises:
        NotImplementedError: there is one; the message names it.
    """
    places: dict[nn.Module, list[str]] = {model.get_submodule(layer): [] for layer in layers}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in places and name.startswith(f"{prefix}."):
            places[module].append(name)
    for names in places.values():
        if len(names) > 1:
            raise NotImplementedError(
                f"{names[0]} is also {names[1]}: layers that several decoder blocks share cannot be calibrated block by "
                "block. Without calibration the model can be quantized"
            )


@dataclass(frozen=True)
class Captured:
    """How a model calls its blocks.

    Attributes:
        calls: a call per block, by the number of windows that go through the blocks at once.
        wrap: puts hidden states in the form in which a block returns them.
        chained: whether every block receives what the one before it returns, unchanged.
    """

    calls: dict[int, list[Call]]
    wrap: Callable[[Tensor], Any]
    chained: bool

    def of_block(self, number: int) -> dict[int, Call]:
        """The calls of one block, by the number of windows."""
        return {windows: calls[number] for windows, calls in self.calls.items()}


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], hidden: Activations, upcast: bool = False
) -> Captured:
    """The input of the first block for every window, and the calls of all blocks. No block but the first is computed.

    Args:
        batches: token ids int64 `[b, L]`.
        hidden: receives the hidden states `[b, L, D]` of every batch, by its number.
        upcast: keep 16-bit floats as float32.

    Raises:
        NotImplementedError: the model does not run every block once and in order, or calls one with something that
            depends on the text.
        ValueError: the blocks have device hooks.
    """
    first, *second = [window[None] for batch in batches[:2] for window in batch][:2]
    wrap = _output_form(model, blocks, first)
    inputs, alone = _record(model, blocks, first, wrap, to_the_end=True)
    captured = Captured({}, wrap, all(torch.equal(states, inputs[0]) for states in inputs))
    for window in second:
        _refuse_varying(alone, _record(model, blocks, window, wrap, to_the_end=False)[1])
    for number, batch in enumerate(batches):
        (states, *_), calls = _record(model, blocks, batch, wrap, to_the_end=False)
        hidden[number] = to_device(states.cpu(), torch.device("cpu"), upcast)
        captured.calls.setdefault(len(batch), calls)
    return captured


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states after a block."""
    return hidden_of(block(hidden, *call.args, **call.kwargs))


@contextmanager
def streamed(
    model: nn.Module,
    blocks: nn.ModuleList,
    device: torch.device,
    upcast: bool,
    around: Callable[[int, Callable], Callable] | None = None,
) -> Iterator[None]:
    """Have a model compute its blocks on `device`, where they are moved one at a time while it runs.

    Args:
        model: on one device, where everything else is computed.
        device: may be the model's own.
        upcast: compute in float32 what is held in 16-bit floats.
        around: gives each block, by its number and from its forward pass, the one that it has meanwhile.
    """
    home = model.get_input_embeddings().weight.device
    with ExitStack() as stack:
        stack.enter_context(outside_upcast(model, blocks, upcast))
        if upcast or device != home or around is not None:
            for number, block in enumerate(blocks):
                forward = _moved(block, device, home, upcast)
                stack.enter_context(replaced_forward(block, around(number, forward) if around else forward))
        yield


@contextmanager
def outside_upcast(model: nn.Module, blocks: nn.ModuleList, upcast: bool) -> Iterator[None]:
    """With `upcast`, hold what is outside the blocks in float32."""
    with ExitStack() as stack:
        for module in _outside(model, blocks) if upcast else ():
            stack.enter_context(placed(module, next(module.parameters()).device, upcast))
        yield


def _moved(block: nn.Module, device: torch.device, home: torch.device, upcast: bool) -> Callable:
    """The forward pass of a block, on another device."""
    forward = block.forward

    def moved(*args: Any, **kwargs: Any) -> Any:
        with placed(block, device, upcast):
            output = forward(*_to_device(args, device, upcast), **_to_device(kwargs, device, upcast))
            return _to_device(output, home, False)

    return moved


def _outside(module: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The largest modules with parameters that do not hold the blocks."""
    for child in module.children():
        if child is not blocks and blocks in child.modules():
            yield from _outside(child, blocks)
        elif child is not blocks and any(True for _ in child.parameters()):
            yield child


def _record(
    model: nn.Module, blocks: nn.ModuleList, windows: Tensor, wrap: Callable[[Tensor], Any], to_the_end: bool
) -> tuple[list[Tensor], list[Call]]:
    """Every block's input and call, with blocks that return their input instead of computing.

    With `to_the_end`, the model runs on after the last block, up to its output head, which shows whether it runs blocks
    again. Not further: a loss may be computed from what blocks would have returned.
    """
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def recorder(number: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if number != len(calls):
                raise NotBlockByBlock(
                    f"{type(model).__name__} runs its decoder block {number} "
                    f"{'again' if number < len(calls) else f'before block {len(calls)}'}; only models that run every "
                    "block once and in order can be calibrated. Without calibration it can be quantized"
                )
            hidden, call = _split(args, kwargs)
            inputs.append(hidden)
            calls.append(call)
            if len(calls) == len(blocks) and not to_the_end:
                raise Stop
            return wrap(hidden)

        return forward

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, recorder(number)))
        head = model.get_output_embeddings()
        if head is not None:
            stack.enter_context(replaced_forward(head, _stop))
        _run_until_stop(model, windows)
    if len(calls) != len(blocks):
        raise NotBlockByBlock(f"{type(model).__name__} ran {len(calls)} of its {len(blocks)} decoder blocks")
    return inputs, calls


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise Stop


def _output_form(model: nn.Module, blocks: nn.ModuleList, windows: Tensor) -> Callable[[Tensor], Any]:
    """How a block returns hidden states: as a tensor, or first in a tuple."""
    outputs: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise Stop

    handle = blocks[0].register_forward_hook(hook)
    try:
        _run_until_stop(model, windows)
    finally:
        handle.remove()
    return form_of(outputs[0])


def _run_until_stop(model: nn.Module, windows: Tensor) -> None:
    device = model.get_input_embeddings().weight.device
    with suppress(Stop):
        model(input_ids=windows.to(device), use_cache=False)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, passed first or by name, and the rest of a block's arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


@contextmanager
def replaced_forward(block: nn.Module, forward: Callable) -> Iterator[None]:
    if "forward" in block.__dict__:  # set by accelerate's hooks
        raise ValueError("calibration needs a model without device hooks: load it on one device, without offloading")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def form_of(output: Any) -> Callable[[Tensor], Any]:
    """Wraps a tensor in the form of a module's output, which is a tensor or a tuple that begins with one."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda tensor: (tensor, *rest)
    return lambda tensor: tensor


def _to_device(value: Any, device: torch.device, upcast: bool) -> Any:
    """`to_device` for all tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return to_device(value, device, upcast)
    if isinstance(value, dict):
        return {key: _to_device(item, device, upcast) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device, upcast) for item in value)
    return value


def _refuse_varying(calls: list[Call], others: list[Call]) -> None:
    for number, (call, other) in enumerate(zip(calls, others)):
        second = other.named()
        for name, value in call.named().items():
            if not _same(value, second.get(name)):
                raise NotBlockByBlock(
                    f"argument {name!r} of decoder block {number} depends on the text; such a model cannot be "
                    "calibrated block by block. Without calibration it can be quantized"
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b
