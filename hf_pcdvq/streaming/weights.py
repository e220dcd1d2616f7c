"""`StreamedWeights`: the weights of a checkpoint as a calibrated run asks for them, and `Output`: where results go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ..calibration.activations import Activations
from ..calibration.blocks import NotBlockByBlock, capture, outside_upcast, replaced_forward, run_block
from ..calibration.identity import Identity, model_identity
from ..calibration.weights import ModelWeights
from ..emulation import is_emulated, placed
from ..evaluation.metrics import window_logits
from ..files.contents import model_hash, tensor_hash
from ..files.headers import checkpoint_files
from ..files.hollow import HollowFiles
from ..files.packing import complete
from ..modules import PackedModule
from ..processes import Processes
from .checkpoint import Checkpoint, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Output:
    """The files of a packed model, written one unit at a time.

    Args:
        skeleton: the packed model on the meta device, ready to be saved.
        folder: receives the files of the model, of which those with weights are only laid out.
        max_shard_size: see `save_pretrained`.
    """

    def __init__(self, skeleton: PreTrainedModel, folder: Path, max_shard_size: str):
        skeleton.save_pretrained(folder, max_shard_size=max_shard_size)
        self._skeleton = skeleton
        self._files = HollowFiles(checkpoint_files(folder))
        self._hashes: dict[str, str] = {}  # by the names of tensors in the model
        self._stored: dict[str, str] = {}  # and in its files

    def write(self, model: PreTrainedModel, unit: Unit) -> None:
        """Write the tensors of a unit, which are in memory in their final state.

        Raises:
            ValueError: the model has no such tensors.
            OSError: they cannot be written.
        """
        state = {name: tensor for name, tensor in model.state_dict().items() if unit.holds(name)}
        own = {name: tensor_hash(tensor) for name, tensor in state.items()}
        self._hashes |= own
        for name, tensor in revert_weight_conversion(self._skeleton, dict(state)).items():
            if name in self._files:  # not one that is tied to another, or never saved
                self._files.write(name, tensor)
                self._stored[name] = own[name] if tensor is state.get(name) else tensor_hash(tensor)

    def finish(self) -> None:
        """Complete the files.

        Raises:
            ValueError: a tensor was not written.
        """
        missing = self._skeleton.state_dict().keys() - self._hashes.keys()
        if missing:
            raise ValueError(f"tensors of the model were never written: {', '.join(sorted(missing)[:4])}")
        complete(self._files, self._stored, model_hash(self._hashes))


class StreamedWeights(ModelWeights):
    """Weights that are read from a checkpoint when they are needed, and dropped afterwards.

    Args:
        checkpoint: dense, or packed.
        activations: makes what activations are kept in.
        output: receives finished units; None if there is nothing to write.
    """

    def __init__(self, checkpoint: Checkpoint, activations: Callable[[], Activations], output: Output | None = None):
        self.model, self.home = checkpoint.model, torch.device("cpu")
        self._checkpoint, self._activations, self._output = checkpoint, activations, output

    def identity(self, processes: Processes) -> Identity:
        return model_identity(self.model, self._checkpoint.weights_hash(processes))

    def outside(self, blocks: str) -> list[tuple[str, list[str] | None]]:
        units = self._checkpoint.units.items()
        return [(name, unit.modules) for name, unit in units if not name.startswith(f"{blocks}.")]

    @contextmanager
    def loaded(self, *units: str) -> Iterator[None]:
        with self._checkpoint.loaded(*units):
            for unit in units:
                for name in self._checkpoint.units[unit].modules:
                    module = self.model.get_submodule(name)
                    if isinstance(module, PackedModule):
                        module.reset_tables()
            yield

    @contextmanager
    def loaded_outside(self, blocks: str, head: bool) -> Iterator[None]:
        output, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        needed = []
        for name, modules in self.outside(blocks):
            parts = [self.model.get_submodule(module) for module in modules]
            if head or not any(part is output for part in parts) or any(part is embeddings for part in parts):
                needed.append(name)
        with self.loaded(*needed):
            yield

    def finish(self, unit: str) -> None:
        if self._output is not None:
            self._output.write(self.model, self._checkpoint.units[unit])

    def logits(self, blocks: str, windows: Tensor, device: torch.device) -> Iterator[Tensor]:
        # Block by block instead of window by window, so that every weight is read once.
        model, modules = self.model, self.model.get_submodule(blocks)
        upcast, hidden = is_emulated(model.dtype, device), self._activations()
        with ExitStack() as stack:
            stack.enter_context(self.loaded_outside(blocks, head=False))
            stack.enter_context(self.loaded(f"{blocks}.0"))
            stack.enter_context(outside_upcast(model, modules, upcast))
            stack.enter_context(placed(modules[0], self.home, upcast))
            captured = capture(model, modules, windows.split(1), hidden)
        if not captured.chained:
            raise NotBlockByBlock(f"{type(model).__name__} changes hidden states between its decoder blocks")
        for number, block in enumerate(modules):
            with self.loaded(f"{blocks}.{number}"), placed(block, device, upcast):
                call = captured.of_block(number)[1].to(device, upcast)
                for window in range(len(windows)):
                    hidden[window] = run_block(block, hidden[window].to(device), call).cpu()
        with ExitStack() as stack:
            stack.enter_context(self.loaded_outside(blocks, head=True))
            stack.enter_context(outside_upcast(model, modules, upcast))
            for number, window in enumerate(windows):
                known = captured.wrap(hidden[number].to(self.home))
                with ExitStack() as replaced:
                    for block in modules:
                        replaced.enter_context(replaced_forward(block, lambda *args, known=known, **kwargs: known))
                    found = window_logits(model, window)
                yield found
