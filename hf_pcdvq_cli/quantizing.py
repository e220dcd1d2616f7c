"""The two ways in which `hf-pcdvq quantize` makes a packed model: part by part, or loaded into memory whole."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .common import load_model, note, progress_wanted
from .recover import recover_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_pcdvq.allocation.report import Allocation
    from hf_pcdvq.config import PackedConfig
    from hf_pcdvq.processes import Processes
    from hf_pcdvq.quantize import Quantized
    from hf_pcdvq.recovery.report import RecoveryReport


class Run(NamedTuple):
    """What to quantize, how, and where to.

    Attributes:
        model, source: name or folder of the dense model, and further arguments to load it.
        config: what to make of it.
        tokenizer: None if there is none.
        folder: receives the packed model; only the first process writes it.
        work_dir: keeps finished parts.
        allocation: whose bits by layer `config` has, or None.
        options: those of the command.
        processes: those that share the work.
    """

    model: str
    source: dict[str, Any]
    config: PackedConfig
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path
    work_dir: Path
    allocation: Allocation | None
    options: dict[str, Any]
    processes: Processes

    @property
    def resuming(self) -> dict[str, Any]:
        return {
            "work_dir": self.work_dir,
            "restart": self.options["force"],
            "batch_tokens": self.options["batch_tokens"],
            "progress": progress_wanted(),
            "processes": self.processes,
        }


def quantize_and_save(run: Run, scratch: Path) -> tuple[Quantized, RecoveryReport | None]:
    """Quantize, part by part if that can be, and else in memory; activations may be kept in `scratch`."""
    from hf_pcdvq.streaming.checkpoint import CannotStream

    if run.allocation is not None:
        _check_allocation(run.allocation, run)
    try:
        return _streamed(run, scratch), None
    except CannotStream as reason:
        if run.config.calibration is None and run.processes.count > 1:
            raise ValueError(
                f"the model has to be loaded whole, and is then rounded in one process: {reason}"
            ) from None
        note(f"The model is loaded into memory whole: {reason}")
    return _in_memory(run)


def _check_allocation(allocation: Allocation, run: Run) -> None:
    """Refuse an allocation of another model or of other layers, before anything is computed."""
    from hf_pcdvq.allocation.fitting import check_fits
    from hf_pcdvq.quantizer import PackedHfQuantizer

    model = load_model(run.model, run.options["dtype"], "meta", **run.source)
    # A copy: the selection is recorded in the config.
    names = PackedHfQuantizer(copy.copy(run.config), pre_quantized=False).select(model)
    check_fits(allocation, model, names, run.config)


def _streamed(run: Run, scratch: Path) -> Quantized:
    """Quantize the model part by part and save it.

    Raises:
        CannotStream: it has to be loaded whole.
    """
    from hf_pcdvq.streaming.checkpoint import CannotStream
    from hf_pcdvq.streaming.quantize import quantize_checkpoint

    if run.options["recover"]:
        raise CannotStream("--recover trains it towards its original, which is in memory beside it")
    return quantize_checkpoint(
        load_model(run.model, run.options["dtype"], "meta", **run.source),
        run.tokenizer,
        run.config,
        run.folder,
        scratch,
        device=_device(run),
        max_shard_size=run.options["max_shard_size"],
        **run.resuming,
    )


def _device(run: Run) -> str | None:
    """The device to compute on; None takes the accelerator if there is one."""
    from hf_pcdvq.streaming.checkpoint import CannotStream

    wanted = run.options["device_map"]
    if run.config.calibration is not None or wanted in (None, "auto"):
        return None  # decoder blocks are calibrated on the accelerator wherever the model is
    if re.fullmatch(r"[a-z]+(:\d+)?", wanted) and wanted not in ("balanced", "sequential"):
        return wanted
    raise CannotStream(f"--device-map {wanted} spreads it over devices")


def _in_memory(run: Run) -> tuple[Quantized, RecoveryReport | None]:
    """Quantize the model in memory, recover it if that is asked for, and save it."""
    from hf_pcdvq.calibration.held_out import with_comparison
    from hf_pcdvq.calibration.weights import ModelWeights
    from hf_pcdvq.quantize import Quantized, quantize_uncompared

    options, held_out, recovery = run.options, None, None
    if run.config.calibration is None:
        packing = {"quantization_config": run.config}
        loaded = load_model(run.model, options["dtype"], options["device_map"], **packing, **run.source)
    else:
        # On the CPU: the decoder blocks are moved to the accelerator one at a time.
        loaded = load_model(run.model, options["dtype"], options["device_map"] or "cpu", **run.source)
        held_out = quantize_uncompared(loaded, run.tokenizer, run.config, **run.resuming)
    if options["recover"]:
        recovery = recover_quantized(loaded, run.model, run.tokenizer, options, run.work_dir, run.source)
    if run.processes.rank == 0:
        _save(loaded, run.folder, options["max_shard_size"])
    report = loaded.hf_quantizer.report
    compared = Quantized(report, lambda out: with_comparison(report, lambda: ModelWeights(loaded), held_out))
    return compared, recovery


def _save(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """Save a model; an error of the safetensors library, which says neither what failed nor where, names the folder."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(
            f"the model could not be saved in {folder}: {error}. After calibration, the same command goes on from here"
        ) from error
