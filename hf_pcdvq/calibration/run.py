"""The calibrated path: the layers of a model are replaced by packed ones, decoder block by decoder block.

Hidden states of all windows travel through the blocks twice: as the original model has them, and as the model quantized
so far has them. Within a block, layers are quantized in the order in which they run. For each group of layers that
share an input, the second kind of hidden states goes through the block up to that group, whose inputs then contain all
errors made so far; they give its Hessian, and their difference from the original inputs its correction.

In memory are the model, the moments of one group, and on the CPU, in the model's dtype, the hidden states of all
windows and the original inputs of one block's layers. A CPU that only emulates the model's dtype computes in float32
instead, block by block, with the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..codecs.base import Codec, Packed
from ..emulation import is_emulated, moved, placed
from ..evaluation.metrics import Evaluation, compare_logits
from ..modules import dense_weights, packed_type
from .blocks import Call, Shortcuts, capture, find_blocks, logits_of, run_block
from .experts import RoutedTokens, quantize_experts, routed_tokens
from .hessian import InputMoments
from .inputs import OriginalInputs, Stop, recorded_inputs
from .layers import quantize_layers
from .records import BlockRecord, LayerRecord
from .settings import Calibration
from .store import BlockStore

PackedLayers = dict[str, dict[str, Packed]]  # by module and by parameter

# Above this many groups of layers in a block, as of experts that are modules of their own, the groups are not quantized
# one after the other but together: a partial forward pass for each would take too long.
_MAX_STAGES = 8


@dataclass
class _Block:
    """A decoder block, what it is called with, and the hidden states of all windows before it (later, behind it)."""

    module: nn.Module
    layers: dict[str, nn.Module]  # those to quantize
    call: Call
    original: list[Tensor]
    hidden: list[Tensor]
    device: torch.device
    shortcuts: Shortcuts | None = None

    def find_shortcuts(self) -> None:
        layers = {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Linear)}
        self.shortcuts = Shortcuts(self.module, layers, self.hidden[0].to(self.device), self.call)

    def forward(self, index: int) -> Tensor:
        """The hidden states behind the block as it is now, on the CPU."""
        with self.shortcuts.taken(index) if self.shortcuts else nullcontext():
            return run_block(self.module, self.hidden[index].to(self.device), self.call).cpu()


class CalibratedRun:
    """One pass over the blocks of a model.

    Args:
        model: a dense model on one device. Its layers are replaced as the run goes.
        names: the modules to quantize: linear layers and fused experts.
        codec_of: the packed format of a module, by its name.
        settings: which options are on.
        windows: token ids int64 `[n, L]` to calibrate on.
        holdout: further ones, `[m, L]`, on which the two models are compared; m may be 0.
        device: where blocks are computed; they return to their own device.
        store: keeps finished blocks, so that an interrupted run can go on; None keeps nothing.
        progress: show a progress bar.

    Attributes, once `run` is done:
        layers: a record of every layer.
        blocks: a record of every decoder block.
        comparison: of the two models on `holdout`; None if that is empty or the model has no output head.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        codec_of: Callable[[str], Codec],
        settings: Calibration,
        windows: Tensor,
        holdout: Tensor,
        device: torch.device,
        store: BlockStore | None,
        progress: bool,
    ):
        self.layers: list[LayerRecord] = []
        self.blocks: list[BlockRecord] = []
        self.comparison: Evaluation | None = None
        self._model, self._names, self._codec_of, self._settings = model, names, codec_of, settings
        self._windows, self._holdout, self.device, self._store = windows, holdout, device, store
        self._widen = is_emulated(model.dtype, device)
        stacks = [weight for name in names for weight in dense_weights(model.get_submodule(name)).values()]
        matrices = sum(1 if weight.ndim == 2 else len(weight) for weight in stacks)
        self._bar = tqdm(total=matrices, desc="Calibrating", unit="weight", smoothing=0, disable=not progress)

    @torch.no_grad()
    def run(self) -> None:
        """Quantize everything."""
        prefix = find_blocks(self._model, self._names)
        blocks: nn.ModuleList = self._model.get_submodule(prefix)
        with self._bar:
            hidden, calls = capture(self._model, blocks, torch.cat([self._windows, self._holdout]))
            hidden = [moved(states, states.device, self._widen) for states in hidden]
            original = list(hidden)
            for number, (block, call) in enumerate(zip(blocks, calls)):
                started = time.perf_counter()
                name = f"{prefix}.{number}"
                layers = {layer: self._model.get_submodule(layer) for layer in self._names if _inside(layer, name)}
                with placed(block, self.device, self._widen):
                    call = call.to(self.device, self._widen)
                    states = _Block(block, layers, call, original, hidden, self.device)
                    self._run_block(number, states)
                self.blocks.append(BlockRecord(name, _error(original, hidden), time.perf_counter() - started))
            self._round_outside(prefix)
        if len(self._holdout) and self._model.get_output_embeddings() is not None:
            home = self._model.get_input_embeddings().weight.device
            with placed(self._model, home, self._widen):
                self.comparison = self._compare(blocks, original, hidden)

    def _run_block(self, number: int, block: _Block) -> None:
        """Quantize one block and replace the hidden states before it, in both lists, by those behind it."""
        stored = self._store.load(number) if self._store else None
        if stored is None:
            inputs = self._advance_original(block, keep=self._settings.correction > 0)
            packed, records = self._quantize_block(block, inputs)
            if self._store:
                self._store.save(number, packed, records)
        else:
            self._advance_original(block, keep=False)
            packed, records = stored
            self._take_down(records)
            self._install(block.layers, packed)
        for index in range(len(block.hidden)):
            block.hidden[index] = block.forward(index)
        for name, layer in block.layers.items():
            self._replace(name, layer, packed[name])

    def _advance_original(self, block: _Block, keep: bool) -> OriginalInputs:
        """Run the dense block on the original's hidden states, which are replaced by those behind it.

        Returns:
            The inputs of the layers on the way, for the windows to calibrate on.
        """
        found = OriginalInputs(list(block.layers), keep)
        with recorded_inputs(block.layers) as inputs:
            for index, states in enumerate(block.original):
                block.original[index] = run_block(block.module, states.to(block.device), block.call).cpu()
                if index < len(self._windows):
                    found.add(inputs)
                inputs.clear()
        return found

    def _quantize_block(self, block: _Block, inputs: OriginalInputs) -> tuple[PackedLayers, list[LayerRecord]]:
        """Quantize a block's layers in the order in which they run, each with what those before it have become.

        Returns:
            The packed tensors and the records of every layer. The layers themselves are left with decoded weights.
        """
        packed: PackedLayers = {}
        records: list[LayerRecord] = []
        block.find_shortcuts()
        for stage in _stages(inputs.groups(), block.layers):
            first = stage[0][0]
            if not isinstance(block.layers[first], nn.Linear):
                self._quantize_experts(block.layers, first, self._tokens(block, first, inputs), packed, records)
                continue
            moments = self._moments(block, stage, inputs)
            for names in stage:
                self._quantize_group(block.layers, names, moments[names[0]], packed, records)
        for name in inputs.idle():
            self._round(block.layers, name, packed, records)
        return packed, records

    def _moments(self, block: _Block, stage: list[list[str]], inputs: OriginalInputs) -> dict[str, InputMoments]:
        """Moments of the inputs of a stage's groups, by the first layer of each, with the block as it is now."""
        leaders = [names[0] for names in stage]
        moments = {name: InputMoments(block.layers[name].in_features, block.device) for name in leaders}
        last = leaders[0] if len(leaders) == 1 else None
        with recorded_inputs({name: block.layers[name] for name in leaders}, last) as now:
            for index in range(len(self._windows)):
                with suppress(Stop):
                    block.forward(index)
                for name, tensor in now.items():
                    moments[name].add(tensor, inputs.of(name, index))
                    if last is not None:  # else other layers of this stage may change it yet
                        block.shortcuts.keep(name, index, tensor)
                now.clear()
        return moments

    def _quantize_group(
        self,
        layers: dict[str, nn.Module],
        names: list[str],
        moments: InputMoments | None,
        packed: PackedLayers,
        records: list[LayerRecord],
    ) -> None:
        """Quantize layers with a common input; results go into `packed` and `records`, decoded weights into the layers."""
        by_codec: dict[Codec, list[str]] = {}
        for name in names:
            by_codec.setdefault(self._codec_of(name), []).append(name)
        for codec, some in by_codec.items():
            tensors, found = quantize_layers({name: layers[name] for name in some}, moments, codec, self._settings)
            self._finish(layers, {name: {"weight": tensors[name]} for name in some}, found, packed, records)

    def _tokens(self, block: _Block, name: str, inputs: OriginalInputs) -> RoutedTokens:
        """The tokens that reach fused experts, with the block as it is now."""
        originals = [inputs.of(name, index) for index in range(len(self._windows))]
        return routed_tokens(block.layers[name], range(len(self._windows)), block.forward, originals)

    def _quantize_experts(
        self,
        layers: dict[str, nn.Module],
        name: str,
        tokens: RoutedTokens | None,
        packed: PackedLayers,
        records: list[LayerRecord],
    ) -> None:
        """The same for fused experts, which `tokens` reach."""
        tensors, found = quantize_experts(name, layers[name], tokens, self._codec_of(name), self._settings)
        self._finish(layers, {name: tensors}, found, packed, records)

    def _round(
        self, layers: dict[str, nn.Module], name: str, packed: PackedLayers, records: list[LayerRecord]
    ) -> None:
        """The same for a layer, or fused experts, that no token has reached."""
        if isinstance(layers[name], nn.Linear):
            self._quantize_group(layers, [name], None, packed, records)
        else:
            self._quantize_experts(layers, name, None, packed, records)

    def _finish(
        self,
        layers: dict[str, nn.Module],
        tensors: PackedLayers,
        found: list[LayerRecord],
        packed: PackedLayers,
        records: list[LayerRecord],
    ) -> None:
        self._install({name: layers[name] for name in tensors}, tensors)
        self._take_down(found)
        packed.update(tensors)
        records += found

    def _install(self, layers: dict[str, nn.Module], packed: PackedLayers) -> None:
        """Give dense layers the weights that the codes stand for: packed ones would be decoded for every window."""
        for name, layer in layers.items():
            decoder = packed_type(layer).from_packed(layer, self._codec_of(name), packed[name])
            for parameter, weight in dense_weights(layer).items():
                decoded = decoder.decoded(parameter, weight.dtype)
                setattr(layer, parameter, nn.Parameter(decoded, requires_grad=False))

    def _replace(self, name: str, layer: nn.Module, packed: dict[str, Packed]) -> None:
        """Put the packed module in the place of a dense one."""
        self._model.set_submodule(name, packed_type(layer).from_packed(layer, self._codec_of(name), packed))

    def _take_down(self, records: list[LayerRecord]) -> None:
        """Keep the records of finished layers, and show them."""
        self.layers += records
        for record in records:
            loss = "" if record.proxy_loss is None else f" error {record.proxy_loss:.4f}"
            self._bar.set_postfix_str(f"{record.name}{loss}", refresh=False)
            self._bar.update()

    def _round_outside(self, prefix: str) -> None:
        """Quantize the layers outside the decoder blocks, which have no Hessian."""
        for name in self._names:
            if not _inside(name, prefix):
                layer = self._model.get_submodule(name)
                packed: PackedLayers = {}
                self._round({name: layer}, name, packed, [])
                self._replace(name, layer, packed[name])

    def _compare(self, blocks: nn.ModuleList, original: list[Tensor], hidden: list[Tensor]) -> Evaluation:
        """Both models' predictions on the windows held out, from the hidden states behind the last block."""
        start = len(self._windows)
        pairs = (
            tuple(logits_of(self._model, blocks, window, states) for states in both)
            for window, both in zip(self._holdout, zip(original[start:], hidden[start:]))
        )
        return compare_logits(pairs, self._holdout, progress=not self._bar.disable)


def _stages(groups: list[list[str]], layers: dict[str, nn.Module]) -> list[list[list[str]]]:
    """What is quantized at a time, in turn: groups of linear layers with a common input, or fused experts by themselves.

    Too many groups of linear layers are one stage, and the experts come after it.
    """
    stages: list[list[list[str]]] = []
    for group in groups:
        alike = [name for name in group if isinstance(layers[name], nn.Linear)]
        stages += [[alike]] if alike else []
        stages += [[[name]] for name in group if name not in alike]
    linear = [names for (names,) in stages if isinstance(layers[names[0]], nn.Linear)]
    experts = [stage for stage in stages if stage[0] not in linear]
    return stages if len(linear) <= _MAX_STAGES else [linear, *experts]


def _inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _error(original: list[Tensor], hidden: list[Tensor]) -> float:
    """Squared difference of two lists of hidden states, as a share of the squares of the first."""
    error = sum((a.float() - b.float()).square().sum(dtype=torch.float64).item() for a, b in zip(original, hidden))
    return error / sum(a.float().square().sum(dtype=torch.float64).item() for a in original)
