"""`Checkpoint`: a model on the meta device, whose weights are read from safetensors files one unit at a time.

A unit is an element of an outermost `nn.ModuleList` (a decoder block, a block of a tower for images), or a module
outside such lists that holds tensors of its own (embeddings, norms, the output head); modules with tied weights are one
unit. Transformers' own loading function converts what is in the files into the model's parameters, so renamed and fused
weights, and those that are packed while they load, come out as from `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..files.contents import model_hash, tensor_hash
from ..files.headers import StoredTensor, checkpoint_files, read_headers
from ..processes import Processes
from .freed_memory import return_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..quantizer import PackedHfQuantizer


_PIECE = 16 << 20  # bytes that are hashed at a time


class CannotStream(Exception):
    """A checkpoint has to be loaded whole; the message says why."""


@dataclass
class Unit:
    """A part of a model that is read as a whole.

    Attributes:
        modules: names of the modules that hold its tensors.
        keys: names of its tensors in the files.
    """

    modules: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def holds(self, tensor: str) -> bool:
        """Whether a tensor of the model, by its name, belongs to it."""
        return _owner(tensor) in self.modules


class Checkpoint:
    """The weights of a model, in files.

    Args:
        model: from `from_pretrained(..., device_map="meta")`. Its non-persistent buffers are computed, on the CPU.
        device: where weights are read to.

    Attributes:
        units: by name, in the order of the model.

    Raises:
        CannotStream: the checkpoint has to be loaded whole.
        ValueError: a file is damaged.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu"):
        _refuse(model)
        self.model, self.device = model, torch.device(device)
        try:
            self.files = checkpoint_files(_folder(model))
        except FileNotFoundError as error:
            raise CannotStream(f"its weights are not in safetensors files ({error})") from error
        self._stored = read_headers(self.files)
        self._quantizer: PackedHfQuantizer | None = None
        self._conversions = get_model_conversion_mapping(model)
        self._targets = self._find_targets()
        self.units = self._find_units()
        self._check_units()
        _compute_buffers(model)

    def packing(self, quantizer: PackedHfQuantizer) -> None:
        """From now on, load what a quantizer packs, or has packed, as it says."""
        self._quantizer = quantizer
        self._conversions = get_model_conversion_mapping(self.model, None, quantizer)

    @contextmanager
    def loaded(self, *names: str, without: frozenset[str] = frozenset()) -> Iterator[None]:
        """Have the weights of units in memory.

        Args:
            without: parameters that are not read.

        Raises:
            ValueError: a tensor of a unit is not in the files, or cannot be packed.
            OSError: a file cannot be read.
        """
        try:
            for name in names:
                self._read(self.units[name], without)
            yield
        finally:
            for name in names:
                self._drop(self.units[name])
            return_freed_memory()

    def weights_hash(self, processes: Processes) -> str:
        """The hash that `model_identity` takes of the model in memory, by reading it unit by unit."""
        place, places = processes.on_this_machine
        own: dict[str, str] = {}
        for name in list(self.units)[place::places]:
            with self.loaded(name):
                state = self.model.state_dict().items()
                own |= {key: tensor_hash(tensor) for key, tensor in state if self.units[name].holds(key)}
        return self._hash_of_all(own, processes)

    def files_hash(self, processes: Processes) -> str:
        """A hash of the files, for which no unit has to be in memory."""
        place, places = processes.on_this_machine
        own: dict[str, str] = {}
        for file in self.files[place::places]:
            digest = xxhash.xxh3_128()
            with file.open("rb", buffering=0) as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
            own[file.name] = digest.hexdigest()
        return self._hash_of_all(own, processes)

    def _hash_of_all(self, own: dict[str, str], processes: Processes) -> str:
        """One hash of the hashes of all parts, of which the processes of every machine have each taken some.

        Raises:
            ValueError: machines hold different checkpoints.
        """
        hashes: dict[str, str] = {}
        for rank, (_, found) in enumerate(processes.gather({}, own)):
            for part, text in found.items():
                if hashes.setdefault(part, text) != text:
                    raise ValueError(
                        f"process {rank} reads another {part} than one before it: the machines hold different checkpoints "
                        f"in {self.files[0].parent}"
                    )
        return model_hash(hashes)

    # --------------------------------------------------------------------------------------------------- units

    def _find_units(self) -> dict[str, Unit]:
        units: dict[str, Unit] = {}
        lists = [name for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        unit_of = {tensor: unit_name(tensor, lists) for tensor in self.model.state_dict()}
        for target, source in self.model.all_tied_weights_keys.items():
            if unit_of[source] != unit_of[target] and not {unit_of[source], unit_of[target]} <= {
                _owner(source),
                _owner(target),
            }:
                raise CannotStream(f"{target} and {source} are tied, and one of them is in a list of blocks")
            moved = unit_of[target]
            unit_of = {tensor: unit_of[source] if unit == moved else unit for tensor, unit in unit_of.items()}
        for tensor, unit in unit_of.items():
            modules = units.setdefault(unit, Unit()).modules
            if _owner(tensor) not in modules:
                modules.append(_owner(tensor))
        for key in self._stored:
            target, _ = self._targets[key]
            if target in unit_of:  # as when loading, what belongs to no parameter is left out
                units[unit_of[target]].keys.append(key)
        return units

    def _find_targets(self) -> dict[str, tuple[str, int]]:
        """For every tensor in the files the first parameter that it becomes, and how many it becomes.

        Found as `from_pretrained` finds it.
        """
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        numbers = {pattern: len(entry.target_patterns) for entry in converters for pattern in entry.source_patterns}
        prefix, known = self.model.base_model_prefix, self.model.state_dict()
        targets = {}
        for key in self._stored:
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if target not in known and key in known:
                target, pattern = rename_source_key(key, [], [], prefix, known)
            targets[key] = target, numbers.get(pattern, 1)
        return targets

    def _check_units(self) -> None:
        """Convert every unit on the meta device, which shows whether its keys give all of its tensors and no others."""
        for name, unit in self.units.items():
            own = {tensor for tensor in self.model.state_dict() if unit.holds(tensor)}
            found = self._load(unit, unit.keys, torch.device("meta"))
            odd = (found - own) | (own - found - self._tied()) or (set() if found else own)
            if odd:
                raise CannotStream(f"{min(odd)!r} is not in its files, or not made of what is stored with {name!r}")
            for target, source in self.model.all_tied_weights_keys.items():
                if {target, source} <= found:
                    raise CannotStream(f"{target} and {source} are tied, and both are in its files")

    # ------------------------------------------------------------------------------------------------- weights

    def _read(self, unit: Unit, without: frozenset[str]) -> None:
        self._load(unit, [key for key in unit.keys if not self._only_for(key, without)], self.device)
        if self._quantizer is not None and self._quantizer.failure is not None:
            raise ValueError(self._quantizer.failure)

    def _only_for(self, key: str, parameters: frozenset[str]) -> bool:
        """Whether a tensor in the files becomes one of these parameters and no other."""
        target, targets = self._targets[key]
        return targets == 1 and target in parameters

    def _load(self, unit: Unit, keys: list[str], device: torch.device) -> set[str]:
        """Load some tensors of a unit, and return the names of the parameters that were made of them."""
        found = self._convert(keys, device)
        own = {tensor for tensor in self._tied() if unit.holds(tensor)}
        if own & found:
            self.model.tie_weights(missing_keys=own - found, recompute_mapping=False)
        return found

    def _tied(self) -> set[str]:
        """The names of all tensors that are tied to another."""
        return {*self.model.all_tied_weights_keys, *self.model.all_tied_weights_keys.values()}

    def _convert(self, keys: list[str], device: torch.device) -> set[str]:
        """Have Transformers load some tensors of the files, and return the names of the parameters that it made."""
        model, conversions = self.model, getattr(self.model, "_weight_conversions", None)
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            hf_quantizer=self._quantizer,
            weight_mapping=self._conversions,
        )
        with self._opened(keys) as tensors, _without_bars():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
        model._weight_conversions = conversions  # those of the whole model, not of this part
        if info.conversion_errors or info.mismatched_keys:
            raise ValueError(f"{self.files[0].parent}: {info.conversion_errors or info.mismatched_keys}")
        return set(model.state_dict()) - info.missing_keys

    @contextmanager
    def _opened(self, keys: list[str]) -> Iterator[dict[str, object]]:
        """Tensors of the files, which are read when they are needed."""
        stored: dict[Path, list[StoredTensor]] = {}
        for key in keys:
            stored.setdefault(self._stored[key].file, []).append(self._stored[key])
        with ExitStack() as stack:
            tensors = {}
            for file, some in stored.items():
                # Not mapped: what has been read would stay in memory until the last tensor of the file is dropped.
                content = stack.enter_context(safe_open(file, "pt", device="cpu", backend="pread"))
                tensors.update({tensor.name: content.get_slice(tensor.name) for tensor in some})
            yield tensors

    def _drop(self, unit: Unit) -> None:
        """Put the tensors of a unit on the meta device, but not the buffers that are computed."""
        empty: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for name in unit.modules:
            module = self.model.get_submodule(name)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    on_meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                    module._parameters[key] = empty.setdefault(id(parameter), on_meta)
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    module._buffers[key] = buffer.to("meta")


def _refuse(model: PreTrainedModel) -> None:
    """Reject a model that `Checkpoint` cannot read."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if len(names) != len(dict(model.named_modules())):
        raise CannotStream(f"{type(model).__name__} uses a module in several places")
    if model.is_custom_code():
        raise CannotStream(f"{type(model).__name__} is not one of Transformers' own classes")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CannotStream("it is an adapter")
    if getattr(model.config, "transformers_weights", None) or type(model.config).extra_files:
        raise CannotStream("its config names other files of weights")


def _folder(model: PreTrainedModel) -> Path:
    """The folder that a model was read from: a given one, or in the cache of the Hub, where its files are by now."""
    from huggingface_hub import snapshot_download

    if Path(model.name_or_path).is_dir():
        return Path(model.name_or_path)
    commit = getattr(model.config, "_commit_hash", None)
    return Path(snapshot_download(model.name_or_path, revision=commit, local_files_only=True))


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def unit_name(tensor: str, lists: list[str]) -> str:
    """The name of the unit of a tensor; `lists` are the names of all lists of modules, outer ones first."""
    around = next((name for name in lists if tensor.startswith(f"{name}.")), None)
    if around is None:
        return _owner(tensor)
    return f"{around}.{tensor.removeprefix(f'{around}.').partition('.')[0]}"


def _compute_buffers(model: PreTrainedModel) -> None:
    """Give the model the buffers that no file holds, as `from_pretrained` does in the end."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
                module._is_hf_initialized = False
    model.initialize_weights()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of Transformers: loading a unit is a small step of a run that has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
