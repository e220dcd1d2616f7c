"""The calibrated path: the layers of a model are replaced by packed ones, decoder block by decoder block.

For every block, each window of tokens goes through it with the hidden states that the model as quantized so far has
there, and with those of the original model. The inputs of its layers give their Hessians; the layers are quantized; and
the block runs once more, to make the next block's inputs. In memory are the model, one block's moments, and the hidden
states of all windows, in the model's dtype on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..codecs.base import Codec, Packed
from ..evaluate import Evaluation, compare_logits
from ..modules import QuantLinear
from .blocks import Call, capture, find_blocks, logits_of, run_block
from .hessian import InputMoments
from .inputs import SharedMoments, recorded_inputs
from .layers import quantize_layers
from .records import BlockRecord, LayerRecord
from .settings import Calibration
from .store import BlockStore


class CalibratedRun:
    """One pass over the blocks of a model.

    Args:
        model: a dense model on one device. Its layers are replaced as the run goes.
        names: the layers to quantize, all `nn.Linear`.
        codec: the packed format.
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
        codec: Codec,
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
        self._model, self._names, self._codec, self._settings = model, names, codec, settings
        self._windows, self._holdout, self.device, self._store = windows, holdout, device, store
        self._bar = tqdm(total=len(names), desc="Calibrating", unit="layer", smoothing=0, disable=not progress)

    @torch.no_grad()
    def run(self) -> None:
        """Quantize everything."""
        prefix = find_blocks(self._model, self._names)
        blocks: nn.ModuleList = self._model.get_submodule(prefix)
        with self._bar:
            hidden, calls = capture(self._model, blocks, torch.cat([self._windows, self._holdout]))
            original = list(hidden)
            for number, (block, call) in enumerate(zip(blocks, calls)):
                started = time.perf_counter()
                name = f"{prefix}.{number}"
                with _on_device(block, self.device):
                    self._run_block(number, name, block, call.to(self.device), original, hidden)
                self.blocks.append(BlockRecord(name, _error(original, hidden), time.perf_counter() - started))
            self._round([name for name in self._names if not name.startswith(f"{prefix}.")])
        if len(self._holdout) and self._model.get_output_embeddings() is not None:
            self.comparison = self._compare(blocks, original, hidden)

    def _run_block(
        self, number: int, name: str, block: nn.Module, call: Call, original: list[Tensor], hidden: list[Tensor]
    ) -> None:
        """Quantize one block and replace the hidden states before it, in both lists, by those behind it."""
        layers = {layer: self._model.get_submodule(layer) for layer in self._names if layer.startswith(f"{name}.")}
        stored = self._store.load(number) if self._store else None
        moments = self._advance_original(block, call, layers if stored is None else {}, original, hidden)
        if stored is None:
            packed, records = self._quantize(layers, moments.groups())
            if self._store:
                self._store.save(number, packed, records)
        else:
            packed, records = stored
            self._take_down(records)
        replacements = self._replacements(layers, packed)
        # While the windows pass, the weights are dense: packed ones would be decoded anew for every window.
        for layer_name, layer in layers.items():
            layer.weight = replacements[layer_name].dequantize(layer.weight.dtype).weight
        for index, states in enumerate(hidden):
            hidden[index] = run_block(block, states.to(self.device), call).cpu()
        for layer_name, replacement in replacements.items():
            self._model.set_submodule(layer_name, replacement)

    def _advance_original(
        self, block: nn.Module, call: Call, layers: dict[str, nn.Module], original: list[Tensor], hidden: list[Tensor]
    ) -> SharedMoments:
        """Run the dense block on the original's hidden states, which are replaced by those behind it, and on the others.

        Returns:
            The moments of the inputs of `layers`; there are none where `layers` is empty.
        """
        moments = SharedMoments(list(layers), self._settings.correction > 0, self.device)
        with recorded_inputs(layers) as inputs:
            for index, (states, now) in enumerate(zip(original, hidden)):
                original[index] = run_block(block, states.to(self.device), call).cpu()
                if layers and index < len(self._windows):
                    before = dict(inputs)
                    if now is not states:  # before the first block nothing differs yet
                        run_block(block, now.to(self.device), call)
                    moments.add(inputs, before)
                inputs.clear()
        return moments

    def _quantize(
        self, layers: dict[str, nn.Module], groups: list[tuple[list[str], InputMoments | None]]
    ) -> tuple[dict[str, Packed], list[LayerRecord]]:
        packed: dict[str, Packed] = {}
        records: list[LayerRecord] = []
        for names, moments in groups:
            group = {name: layers[name] for name in names}
            tensors, found = quantize_layers(group, moments, self._codec, self._settings)
            self._take_down(found)
            packed.update(tensors)
            records += found
        return packed, records

    def _take_down(self, records: list[LayerRecord]) -> None:
        """Keep the records of finished layers, and show them."""
        self.layers += records
        for record in records:
            loss = "" if record.proxy_loss is None else f" error {record.proxy_loss:.4f}"
            self._bar.set_postfix_str(f"{record.name}{loss}", refresh=False)
            self._bar.update()

    def _replacements(self, layers: dict[str, nn.Module], packed: dict[str, Packed]) -> dict[str, QuantLinear]:
        return {name: QuantLinear.from_packed(layer, self._codec, packed[name]) for name, layer in layers.items()}

    def _round(self, names: list[str]) -> None:
        """Layers outside the decoder blocks, which have no Hessian."""
        for name in names:
            layers = {name: self._model.get_submodule(name)}
            packed, _ = self._quantize(layers, [([name], None)])
            self._model.set_submodule(name, self._replacements(layers, packed)[name])

    def _compare(self, blocks: nn.ModuleList, original: list[Tensor], hidden: list[Tensor]) -> Evaluation:
        """Both models' predictions on the windows held out, from the hidden states behind the last block."""
        start = len(self._windows)
        pairs = (
            tuple(logits_of(self._model, blocks, window, states) for states in both)
            for window, both in zip(self._holdout, zip(original[start:], hidden[start:]))
        )
        return compare_logits(pairs, self._holdout, progress=not self._bar.disable)


@contextmanager
def _on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """The block on `device`, and back where it was afterwards."""
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def _error(original: list[Tensor], hidden: list[Tensor]) -> float:
    """Squared difference of two lists of hidden states, as a share of the squares of the first."""
    error = sum((a.float() - b.float()).square().sum(dtype=torch.float64).item() for a, b in zip(original, hidden))
    return error / sum(a.float().square().sum(dtype=torch.float64).item() for a in original)
