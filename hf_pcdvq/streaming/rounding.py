"""`Rounding`: every weight to the nearest codes while it is read, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..calibration.records import QuantizedLayers
from ..calibration.store import BlockStore
from ..codecs.base import Packed
from ..modules import count_matrices, parameter_name
from ..modules.tied import share
from ..processes import Processes
from ..quantizer import PackedHfQuantizer, replace_by_packed
from .checkpoint import Checkpoint
from .weights import Output


class Rounding:
    """Packs the layers of a checkpoint.

    Several processes take units in turn, and send what they make of them to the first, which writes them in the order of the
    model. No unit depends on another, so their number changes nothing.

    Args:
        checkpoint: dense; its model is made ready to be packed.
        quantizer: which packs it.
        names: the layers to pack.
        store: keeps finished units, so that an interrupted run can resume; None keeps nothing. Only the first process has one.
        processes: those that share the units.
        progress: show the progress.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantizer: PackedHfQuantizer,
        names: list[str],
        store: BlockStore | None,
        processes: Processes,
        progress: bool,
    ):
        self._checkpoint, self._model, self._quantizer = checkpoint, checkpoint.model, quantizer
        self._store, self._processes, self._progress = store, processes, progress
        self._matrices = {name: count_matrices(self._model.get_submodule(name)) for name in names}
        for name in names:
            replace_by_packed(self._model, name, quantizer.quantization_config.codec_of(name))
        checkpoint.packing(quantizer)
        self._units = list(checkpoint.units)
        self._layers = [[name for name in names if name in unit.modules] for unit in checkpoint.units.values()]

    def run(self, output: Output | None) -> None:
        """Pack everything.

        Args:
            output: receives all units; None in all processes but the first.

        Raises:
            ValueError: a weight cannot be packed.
            OSError: a file cannot be read or written.
        """
        self._quantizer.show_progress(sum(self._matrices.values()), self._progress)
        makers = self._makers()
        if output is not None:
            for number, name in enumerate(self._units):
                with self._packed_unit(number, makers.get(number)):
                    output.write(self._model, self._checkpoint.units[name])
        else:
            for number in [number for number, maker in makers.items() if maker == self._processes.rank]:
                with self._checkpoint.loaded(self._units[number]):
                    self._processes.send(self._result(number).tensors(), to=0)
        self._quantizer.show_progress(0, False)

    def _makers(self) -> dict[int, int]:
        """The process that packs each unit, by the unit's number; of those that an interrupted run has not finished."""
        missing = [
            number
            for number, layers in enumerate(self._layers)
            if layers and not (self._store and self._store.holds(number))
        ]
        _, missing = self._processes.broadcast({}, missing, source=0)
        return {number: turn % self._processes.count for turn, number in enumerate(missing)}

    @contextmanager
    def _packed_unit(self, number: int, maker: int | None) -> Iterator[None]:
        """Have a unit in memory, packed: here, by another process, or by an interrupted run if there is no `maker`."""
        found, layers = None, self._layers[number]
        if maker is None:
            found = self._store.load(number) if self._store and layers else None
        elif maker != self._processes.rank:
            found = QuantizedLayers.of(self._processes.receive(maker), [])
        without = frozenset(self._packed_parameters(layers) if found else ())
        with self._checkpoint.loaded(self._units[number], without=without):
            if found:
                self._install(found)
                self._quantizer.advance(sum(self._matrices[layer] for layer in layers))
            if self._store and maker is not None:
                self._store.save(number, found or self._result(number))
            yield

    def _result(self, number: int) -> QuantizedLayers:
        """The packed tensors of a unit, which are in memory."""
        return QuantizedLayers({layer: self._packed(layer) for layer in self._layers[number]})

    def _packed(self, layer: str) -> dict[str, Packed]:
        module = self._model.get_submodule(layer)
        return {parameter: module.packed_tensors(parameter) for parameter in module.packed_parameters}

    def _packed_parameters(self, layers: list[str]) -> list[str]:
        """Names of the dense parameters that packed modules have instead; those have others, such as biases, too."""
        modules = {layer: self._model.get_submodule(layer) for layer in layers}
        return [f"{layer}.{parameter}" for layer, module in modules.items() for parameter in module.packed_parameters]

    def _install(self, found: QuantizedLayers) -> None:
        """Give packed modules on the meta device their tensors."""
        for (layer, parameter, suffix), tensor in found.tensors().items():
            name = parameter_name(suffix, parameter)
            setattr(self._model.get_submodule(layer), name, nn.Parameter(tensor, requires_grad=False))
        for layer in found.packed:
            share(self._model, layer)
