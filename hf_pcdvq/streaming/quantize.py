"""`quantize_checkpoint`: from a dense checkpoint to a packed one, without ever having either in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration.activations import Activations, MappedActivations
from ..calibration.blocks import find_blocks
from ..calibration.held_out import with_comparison
from ..calibration.identity import agree, agreed, model_identity, run_identity
from ..calibration.model import calibrate_model, refuse_shared
from ..calibration.report import QuantizationReport
from ..calibration.store import BlockStore
from ..config import PackedConfig
from ..processes import Processes
from ..quantize import Quantized, name_of_dataset
from ..quantizer import PackedHfQuantizer, replace_by_packed
from .checkpoint import CannotStream, Checkpoint
from .rounding import Rounding
from .weights import Output, StreamedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PackedConfig,
    folder: str | Path,
    scratch: str | Path,
    dataset: Any = None,
    *,
    device: torch.device | str | None = None,
    batch_tokens: int | None = None,
    max_shard_size: str = "50GB",
    work_dir: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
    processes: Processes | None = None,
) -> Quantized:
    """Quantize a model that need not fit in memory, and save it.

    The files are those that `quantize_model`, or `from_pretrained` with the config if it has no calibration, and then
    `save_pretrained` would write. In memory are one decoder block at a time, the moments of one group of its layers and
    the activations of one batch of windows; what is outside the blocks when they are run for the first time; and for
    comparing the result with the original, what is outside the blocks and one window's logits. All other activations
    are in files that are mapped while they are used.

    With several `processes`, all of which call this with the same arguments, each takes its share of the windows and of the
    layers of every block, or of the blocks if they are rounded. The first of them alone reads the dataset, uses `work_dir`
    and writes `folder`; `scratch` may be another folder in each.

    Args:
        model: from `from_pretrained(..., device_map="meta")`. It is of no use afterwards.
        tokenizer: see `quantize_model`.
        config: the format; its `calibration` decides whether the model is calibrated. It is not changed.
        folder: receives the model; it exists in the first process; not the one that the original is read from.
        scratch: folder for activations. Those that the comparison needs are there until the result is dropped.
        dataset: see `quantize_model`; None takes what `config.calibration` names.
        device, batch_tokens, work_dir, restart, progress, processes: see `quantize_model`.
        max_shard_size: see `save_pretrained`.

    Raises:
        CannotStream: the checkpoint has to be loaded whole.
        ValueError, NotImplementedError, FileNotFoundError, ImportError, OSError: see `quantize_model`.
    """
    _refuse_whole(config)
    processes = processes or Processes.alone()
    device = processes.device if device is None else device
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    run = _Run(
        model,
        copy.copy(config),
        Path(folder),
        max_shard_size,
        device=torch.device("cpu" if device is None else device),
        work_dir=None if work_dir is None else Path(work_dir),
        restart=restart,
        progress=progress and processes.rank == 0,
        processes=processes,
    )
    if config.calibration is None:
        run.round()
        return Quantized(None, lambda out: None)
    dataset = config.calibration.dataset if dataset is None else dataset
    if dataset is None:
        refuse_shared(config, dataset, processes)
        raise CannotStream("it writes its calibration text itself; with a dataset it is read block by block")
    return run.calibrate(tokenizer, dataset, partial(MappedActivations, Path(scratch)), batch_tokens)


def _refuse_whole(config: PackedConfig) -> None:
    """Reject a config that needs more than one block at a time.

    Raises:
        CannotStream: it does; the message names the setting.
    """
    if config.target is not None:
        raise CannotStream('bits="auto" measures what each of its layers does to its predictions')
    calibration = config.calibration
    for field in ("fisher_groups", "tune_steps") if calibration is not None else ():
        number = getattr(calibration, field)
        if number:
            raise CannotStream(f"{field}={number} takes a backward pass through all of it; 0 is read block by block")


@dataclass
class _Run:
    """A model that is quantized into a folder. See `quantize_checkpoint` for the fields."""

    model: PreTrainedModel
    config: PackedConfig
    folder: Path
    max_shard_size: str
    device: torch.device
    work_dir: Path | None
    restart: bool
    progress: bool
    processes: Processes

    def calibrate(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: Any,
        activations: Callable[[], Activations],
        batch_tokens: int | None,
    ) -> Quantized:
        """Calibrate every block on the outputs of those before it."""
        checkpoint = Checkpoint(self.model)
        self.config.calibration = replace(self.config.calibration, dataset=name_of_dataset(dataset))
        quantizer = PackedHfQuantizer(self.config, pre_quantized=False)
        names = quantizer.select(self.model)
        _check_blocks(checkpoint, names)
        output = self._output(checkpoint, quantizer, names)
        checkpoint.packing(quantizer)
        report, held_out = calibrate_model(
            StreamedWeights(checkpoint, activations, output),
            names,
            self.config,
            dataset,
            tokenizer,
            activations=activations,
            device=self.device,
            batch_tokens=batch_tokens,
            work_dir=self.work_dir,
            restart=self.restart,
            progress=self.progress,
            processes=self.processes,
        )
        self._finish(output)

        def compare(out: Path) -> QuantizationReport:
            if self.processes.rank > 0:  # the first has the original's logits
                return report
            return with_comparison(report, lambda: _saved(type(self.model), out, activations), held_out)

        return Quantized(report, compare)

    def round(self) -> None:
        """Round every weight to the nearest codes while it is read."""
        checkpoint = Checkpoint(self.model, self.device)
        quantizer = PackedHfQuantizer(self.config, pre_quantized=False)
        names = quantizer.select(_before_loading(self.model))
        kept = self.work_dir is not None
        agree(self.model, names, self.config, self.device, self.processes, work_dir=kept)
        store = None
        if kept:
            identity = agreed(model_identity(self.model, checkpoint.files_hash(self.processes)), self.processes)
            owner = run_identity(identity, names, self.config, None, self.device)
            store = self.processes.in_first(lambda: BlockStore(self.work_dir, owner, self.restart))
        output = self._output(checkpoint, quantizer, names)
        Rounding(checkpoint, quantizer, names, store, self.processes, self.progress).run(output)
        self._finish(output)

    def _finish(self, output: Output | None) -> None:
        """Complete the files, before any process goes on: it may want to read them."""
        self.processes.in_first(lambda: output.finish())

    def _output(self, checkpoint: Checkpoint, quantizer: PackedHfQuantizer, names: list[str]) -> Output | None:
        """Save everything but the tensors of the packed model; None in all processes but the first, which writes it."""
        return self.processes.in_first(lambda: self._started_output(checkpoint, quantizer, names))

    def _started_output(self, checkpoint: Checkpoint, quantizer: PackedHfQuantizer, names: list[str]) -> Output:
        if self.folder.resolve() in {file.parent.resolve() for file in checkpoint.files}:
            raise ValueError(
                f"{self.folder} holds the original, which would be overwritten while it is read: choose another"
            )
        skeleton = copy.deepcopy(self.model)
        for name in names:
            replace_by_packed(skeleton, name, self.config.codec_of(name))
        quantizer.hollow = True
        skeleton.hf_quantizer = quantizer
        quantizer.postprocess_model(skeleton)
        return Output(skeleton, self.folder, self.max_shard_size)


def _before_loading(model: PreTrainedModel) -> PreTrainedModel:
    """A copy as `from_pretrained` selects layers in when it rounds: weights are tied after they have loaded."""
    untied = copy.deepcopy(model)
    for name in untied.all_tied_weights_keys:
        path, _, key = name.rpartition(".")
        parameters = untied.get_submodule(path)._parameters
        parameters[key] = nn.Parameter(torch.empty_like(parameters[key]))
    return untied


def _check_blocks(checkpoint: Checkpoint, names: list[str]) -> None:
    """Reject a model whose decoder blocks are not what is read at a time."""
    blocks = find_blocks(checkpoint.model, names)
    for number in range(len(checkpoint.model.get_submodule(blocks))):
        if f"{blocks}.{number}" not in checkpoint.units:
            raise CannotStream(f"{blocks}.{number} cannot be read by itself")


def _saved(kind: type[PreTrainedModel], folder: Path, activations: Callable[[], Activations]) -> StreamedWeights:
    """The weights of a packed model in a folder."""
    return StreamedWeights(Checkpoint(kind.from_pretrained(folder, device_map="meta")), activations)
