"""The calibrated run: the layers of a model are replaced by packed ones, decoder block by decoder block.

The hidden states of all windows pass through the blocks twice: in the original model, and in the model quantized so
far. Within a block, layers are quantized in the order in which they run. For each group of layers that share an
input, the hidden states of the second kind are run through the block up to that group, whose inputs then contain all
errors made so far; they give its Hessian, and their difference from the original inputs gives its correction.

Held are the model, the moments of one group, and in the model's dtype the hidden states of all windows and the original
inputs of one block's layers; `weights.py` and `activations.py` say where. An accelerator that has ample room holds the
latter two itself. A CPU that only emulates the model's dtype computes in float32 instead, block by block, with the same
weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..codecs.base import Codec, Packed
from ..emulation import is_emulated, placed
from ..modules import count_matrices, dense_weights, packed_type
from ..modules.tied import install
from ..processes import Processes
from ..progress import progress_of
from .activations import Activations, HeldActivations
from .blocks import Captured, capture, refuse_shared
from .decoder_block import DecoderBlock
from .experts import RoutedTokens, quantize_experts
from .guidance import output_sensitivity
from .hessian import InputMoments
from .inputs import OriginalInputs
from .layers import quantize_layers
from .records import BlockRecord, LayerRecord, QuantizedLayers
from .settings import OWN_SHARE, Calibration
from .shares import Shares
from .store import BlockStore
from .tuning import Tuning
from .weights import ModelWeights

# A block with more groups of layers than this, such as experts that are modules of their own, has them quantized
# together rather than one after the other: a partial forward pass for each would take too long.
MAX_STAGES = 8


class CalibratedRun:
    """One pass over the blocks of a model.

    Args:
        weights: of a dense model, whose layers are replaced during the run.
        prefix: name of its list of decoder blocks.
        names: the modules to quantize, linear layers and fused experts.
        codec_of: the packed format of a module, by its name.
        settings: the options.
        shares: of the windows to calibrate on, and the processes that divide them and the layers of every block.
        activations: makes what activations are kept in, unless an accelerator has room for them.
        device: where blocks are computed; they return to their own device.
        store: keeps finished blocks, so that an interrupted run can resume; None keeps nothing. Only the first process has one.
        progress: show the progress.

    Attributes, after `run`:
        layers: a record of every layer.
        blocks: a record of every decoder block.
    """

    def __init__(
        self,
        weights: ModelWeights,
        prefix: str,
        names: list[str],
        codec_of: Callable[[str], Codec],
        settings: Calibration,
        shares: Shares,
        *,
        activations: Callable[[], Activations],
        device: torch.device,
        store: BlockStore | None,
        progress: bool,
    ):
        self.layers: list[LayerRecord] = []
        self.blocks: list[BlockRecord] = []
        self._weights, self._model = weights, weights.model
        self._prefix, self._names = prefix, names
        self._codec_of, self._settings = codec_of, settings
        self._shares, self._processes, self._activations = shares, shares.processes, activations
        self.device, self._store = device, store
        self._sensitivity: dict[str, Sequence[Tensor]] = {}
        self._upcast = is_emulated(self._model.dtype, device)
        matrices = sum(count_matrices(self._model.get_submodule(name)) for name in names)
        self._bar = progress_of(total=matrices, desc="Calibrating", unit="weight", smoothing=0, shown=progress)

    @torch.no_grad()
    def run(self) -> None:
        """Quantize everything."""
        prefix = self._prefix
        refuse_shared(self._model, prefix, self._names)
        blocks: nn.ModuleList = self._model.get_submodule(prefix)
        with self._bar:
            self._find_sensitivity()
            hidden = self._activations()
            with self._weights.loaded_outside(prefix, head=False), self._weights.loaded(f"{prefix}.0"):
                captured = capture(self._model, blocks, self._shares.batches, hidden, self._upcast)
            if self._has_room(hidden):
                self._activations = partial(HeldActivations, self.device)
                hidden = self._copied(hidden)
            original = self._copied(hidden)
            tuning = self._tuning(blocks, captured) if self._settings.tune_steps else None
            for number, module in enumerate(blocks):
                started = time.perf_counter()
                name = f"{prefix}.{number}"
                layers = {layer: self._model.get_submodule(layer) for layer in self._names if _inside(layer, name)}
                calls = captured.of_block(number)
                with self._weights.loaded(name):
                    with placed(module, self.device, self._upcast):
                        calls = {size: call.to(self.device, self._upcast) for size, call in calls.items()}
                        kept = self._activations, self._shares
                        self._run_block(
                            number, DecoderBlock(module, layers, calls, original, hidden, self.device, *kept)
                        )
                    self._weights.finish(name)
                for layer in layers:
                    self._sensitivity.pop(layer, None)
                error = _error(original, hidden, self._processes)
                tuned = None if tuning is None else tuning.after(number, hidden)
                if tuned is not None:
                    # The errors so far are in what the rest was tuned to; correcting them again would overdo it.
                    original = self._copied(hidden)
                self.blocks.append(BlockRecord(name, error, time.perf_counter() - started, tuned))
            self._round_outside(prefix)

    def _find_sensitivity(self) -> None:
        """How much the original's predictions depend on the outputs of the layers, if the settings ask for it.

        Only of blocks that no interrupted run has finished; those of a block are dropped after it.
        """
        groups = self._settings.fisher_groups
        blocks = [f"{self._prefix}.{number}" for number in range(len(self._model.get_submodule(self._prefix)))]
        missing = [name for number, name in enumerate(blocks) if not (self._store and self._store.holds(number))]
        names = [name for name in self._names if any(_inside(name, block) for block in missing)]
        if groups and names:
            options = {"device": self.device, "progress": not self._bar.disable}
            batches = self._shares.batches
            windows, sizes = torch.cat(batches), [len(batch) for batch in batches]
            found = output_sensitivity(
                self._model, self._prefix, names, windows, groups, self._settings.seed, **options
            )
            for name, squares in found.items():
                self._sensitivity[name] = [part.flatten(0, 1) for part in squares.split(sizes)]

    def _tuning(self, blocks: nn.ModuleList, captured: Captured) -> Tuning:
        settings = self._settings
        return Tuning(
            self._model,
            blocks,
            [self._model.get_submodule(name) for name in self._names if _inside(name, self._prefix)],
            self._shares.batches,
            captured.wrap,
            steps=settings.tune_steps,
            rate=settings.tune_rate,
            seed=settings.seed,
            device=self.device,
            upcast=self._upcast or self._model.dtype == torch.float16,  # where derivatives vanish or overflow
        )

    def _copied(self, states: Activations) -> Activations:
        copied = self._activations()
        for batch in range(len(states)):
            copied[batch] = states[batch]
        return copied

    def _has_room(self, hidden: Activations) -> bool:
        """Whether an accelerator has room for hidden states and inputs: if they take half of what is free there.

        Copying them to and from an accelerator would take longer than computing a small model's blocks.
        """
        accelerator = torch.get_device_module(self.device)
        if self.device.type == "cpu" or not hasattr(accelerator, "mem_get_info"):
            return False
        layers = [self._model.get_submodule(name) for name in self._names if _inside(name, self._prefix)]
        width = hidden[0].shape[-1]
        widths = sum(layer.in_features if isinstance(layer, nn.Linear) else width for layer in layers)
        blocks = len(self._model.get_submodule(self._prefix))
        states = sum(hidden[batch].nbytes for batch in range(len(hidden)))
        # Hidden states of both models, and the inputs of a block's layers in both.
        needed = 2 * states + 2 * states // width * widths // blocks
        cached = accelerator.memory_reserved(self.device) - accelerator.memory_allocated(self.device)
        free = accelerator.mem_get_info(self.device)[0] + cached
        return needed < free // 2

    # --------------------------------------------------------------------------------------------- one block

    def _run_block(self, number: int, block: DecoderBlock) -> None:
        """Quantize one block, unless an interrupted run has done so, and advance the hidden states past it."""
        stored = self._stored(number)
        if stored is None:
            inputs = block.advance_original(keep=self._settings.correction != 0)
            result = self._quantize_block(block, inputs)
            if self._store:
                self._store.save(number, result)
        else:
            block.advance_original(keep=False)
            result = stored
            self._finish(block.layers, stored)
        block.advance()
        for name, layer in block.layers.items():
            self._replace(name, layer, result.packed[name])

    def _stored(self, number: int) -> QuantizedLayers | None:
        """What an interrupted run, whose store the first process has, has made of a block; None if it has not come so far."""
        found = self._store.load(number) if self._store else None
        tensors, records = self._processes.broadcast(
            found.tensors() if found else {}, found.records if found else None, source=0
        )
        return None if records is None else QuantizedLayers.of(tensors, records)

    def _quantize_block(self, block: DecoderBlock, inputs: OriginalInputs) -> QuantizedLayers:
        """Quantize a block's layers in the order in which they run, each after the errors of those before it.

        The layers are left dense, with decoded weights.
        """
        result = QuantizedLayers()
        block.find_shortcuts()
        for part in self._quantize_parts(block, inputs):
            self._finish(block.layers, part)
            result.add(part)
        return result

    def _quantize_parts(self, block: DecoderBlock, inputs: OriginalInputs) -> Iterator[QuantizedLayers]:
        """The results of `_quantize_block` one after the other; each must be installed before the next is computed."""
        for stage in _stages(inputs.groups(), block.layers):
            first = stage[0][0]
            if isinstance(block.layers[first], nn.Linear):
                moments = block.moments(stage, inputs, self._sensitivity, self._settings.correction == OWN_SHARE)
                for names in stage:
                    layers = {name: block.layers[name] for name in names}
                    yield self._quantize_linear(layers, moments[names[0]])
            else:
                yield self._quantize_experts(first, block.layers[first], block.routed_tokens(first, inputs))
        for name in inputs.idle():
            yield self._round(name, block.layers[name])

    # ------------------------------------------------------------------------------------------- some layers

    def _quantize_linear(self, layers: dict[str, nn.Linear], moments: InputMoments | None) -> QuantizedLayers:
        """Quantize linear layers with a common input."""
        weights: dict[Codec, dict[str, Tensor]] = {}
        for name, layer in layers.items():
            weights.setdefault(self._codec_of(name), {})[name] = layer.weight
        result = QuantizedLayers()
        for codec, some in weights.items():
            packed, records = quantize_layers(some, moments, codec, self._settings, self._processes)
            result.add(QuantizedLayers({name: {"weight": tensors} for name, tensors in packed.items()}, records))
        return result

    def _quantize_experts(self, name: str, experts: nn.Module, tokens: RoutedTokens | None) -> QuantizedLayers:
        """Quantize fused experts."""
        packed, records = quantize_experts(
            name, experts, tokens, self._codec_of(name), self._settings, self._processes
        )
        return QuantizedLayers({name: packed}, records)

    def _round(self, name: str, layer: nn.Module) -> QuantizedLayers:
        """Quantize a linear layer, or fused experts, that no token reached."""
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            return self._quantize_linear({name: layer}, None)
        return self._quantize_experts(name, layer, None)

    def _round_outside(self, prefix: str) -> None:
        """Quantize the layers outside the decoder blocks, for which there are no Hessians."""
        names = [name for name in self._names if not _inside(name, prefix)]
        for unit, modules in self._weights.outside(prefix):
            with self._weights.loaded(unit):
                for name in names if modules is None else [name for name in names if name in modules]:
                    layer = self._model.get_submodule(name)
                    result = self._round(name, layer)
                    self._record(result.records)
                    self._replace(name, layer, result.packed[name])
                self._weights.finish(unit)

    # ------------------------------------------------------------------------------------ results of a layer

    def _finish(self, layers: dict[str, nn.Module], result: QuantizedLayers) -> None:
        """Give quantized layers their decoded weights, since packed ones would be decoded for every window."""
        for name, packed in result.packed.items():
            decoder = packed_type(layers[name]).from_packed(layers[name], self._codec_of(name), packed)
            for parameter, weight in dense_weights(layers[name]).items():
                decoded = decoder.decoded(parameter, weight.dtype)
                setattr(layers[name], parameter, nn.Parameter(decoded, requires_grad=False))
        self._record(result.records)

    def _record(self, records: list[LayerRecord]) -> None:
        """Keep the records of finished layers and advance the progress bar."""
        self.layers += records
        for record in records:
            loss = "" if record.proxy_loss is None else f" error {record.proxy_loss:.4f}"
            self._bar.set_postfix_str(f"{record.name}{loss}", refresh=False)
            self._bar.update()

    def _replace(self, name: str, layer: nn.Module, packed: dict[str, Packed]) -> None:
        """Replace a dense module by the packed one."""
        install(self._model, name, packed_type(layer).from_packed(layer, self._codec_of(name), packed))


def _stages(groups: list[list[str]], layers: dict[str, nn.Module]) -> list[list[list[str]]]:
    """The stages of a block, each a list of groups to quantize: linear layers with a common input, or fused experts.

    Every group is a stage of its own, unless there are too many groups of linear layers: these then form the first
    stage, and the experts follow.
    """
    stages: list[list[list[str]]] = []
    for group in groups:
        alike = [name for name in group if isinstance(layers[name], nn.Linear)]
        stages += [[alike]] if alike else []
        stages += [[[name]] for name in group if name not in alike]
    linear = [names for (names,) in stages if isinstance(layers[names[0]], nn.Linear)]
    experts = [stage for stage in stages if stage[0] not in linear]
    return stages if len(linear) <= MAX_STAGES else [linear, *experts]


def _inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _error(original: Activations, hidden: Activations, processes: Processes) -> float:
    """Squared difference of the hidden states of all batches, relative to the squares of the first."""
    own = []
    for batch in range(len(original)):
        states = original[batch].float()
        change = states - hidden[batch].float()
        own.append([squares.square().sum(dtype=torch.float64).item() for squares in (change, states)])
    every = [pair for _, pairs in processes.gather({}, own) for pair in pairs]  # added in the order of the windows
    error, energy = (sum(squares) for squares in zip(*every))
    return error / energy
