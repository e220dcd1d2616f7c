"""`calibrate_model`: from a dense model and a dataset to a packed model and its report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..allocation.settle import settle_bits
from ..evaluation.metrics import check_length, check_windows
from ..processes import Processes
from .activations import Activations, HeldActivations
from .blocks import NotBlockByBlock, find_blocks
from .data import read_windows, split_windows
from .held_out import HeldOut
from .identity import Identity, agree, agreed, run_identity
from .report import QuantizationReport
from .run import CalibratedRun
from .sampling import sample_from_model
from .shares import Shares
from .store import BlockStore, keep_windows
from .weights import ModelWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config import PackedConfig


logger = logging.getLogger(__name__)


def calibrate_model(
    weights: ModelWeights,
    names: list[str],
    config: PackedConfig,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    activations: Callable[[], Activations] = HeldActivations,
    device: torch.device | None = None,
    batch_tokens: int | None = None,
    work_dir: Path | None = None,
    restart: bool = False,
    progress: bool = True,
    processes: Processes | None = None,
) -> tuple[QuantizationReport, HeldOut | None]:
    """Replace layers of a dense model by packed ones, calibrated on a dataset.

    Args:
        weights: of the model.
        names: the modules to quantize, linear layers and fused experts.
        config: the format of every module, and in `calibration` the options. `bits="auto"` is settled in place.
        dataset: what `read_windows` accepts; None: the model generates the text.
        tokenizer: may be None for token tensors and generated text.
        activations: makes what activations are kept in.
        device: where blocks are computed; None takes the accelerator if there is one, or else the model's device.
        batch_tokens: see `window_batches`.
        work_dir: folder that keeps finished blocks, so that an interrupted run can resume; None keeps nothing.
        restart: compute again what `work_dir` holds of another run, or damaged, instead of refusing it.
        progress: show the progress.
        processes: those that share the run, all of which call this with the same model and settings; None: this one is
            alone. Only the first reads the dataset and uses `work_dir`.

    Returns:
        The measurements of the run, and what `with_comparison` completes them from once the model is usable; None if no
        windows are held out, or the model has no output head.

    Raises:
        ValueError: the model has no decoder blocks, no output head where the settings need one, or values that are not finite;
            the dataset is unsuitable for it; or `work_dir` is damaged or belongs to another run.
        NotFiniteError: see `tuning.py`.
        NotImplementedError: the decoder blocks cannot be run one by one.
        FileNotFoundError, ImportError: see `read_windows`.
        OSError: `work_dir` cannot be written.
    """
    started, model = time.perf_counter(), weights.model
    processes = processes or Processes.alone()
    refuse_shared(config, dataset, processes)
    device = calibration_device(weights, device or processes.device)
    agree(model, names, config, device, processes, batch_tokens=batch_tokens, work_dir=work_dir is not None)
    progress = progress and processes.rank == 0
    training = model.training
    model.eval()
    blocks = find_blocks(model, names)
    if config.calibration.tune_steps and model.get_output_embeddings() is None:
        raise ValueError(
            f"tune_steps={config.calibration.tune_steps} trains towards the original's predictions, and "
            f"{type(model).__name__} has no output head: take 0"
        )
    identity = None if work_dir is None else agreed(weights.identity(processes), processes)
    windows = processes.from_first(
        lambda: all_windows(model, config, dataset, tokenizer, work_dir, identity, restart, progress)
    )
    check_windows(model, windows)
    windows, holdout = split_windows(windows, config.calibration)
    allocation = None
    if config.target is not None:
        allocation = settle_bits(model, names, config, windows, device, work_dir, identity, restart, progress)
    shares = Shares.of(windows, device, batch_tokens, processes)
    store = None
    if work_dir is not None:
        owner = run_identity(identity, names, config, windows, device, shares.at_once, processes.count)
        store = processes.in_first(lambda: BlockStore(work_dir, owner, restart))
    held_out = None
    if len(holdout) and model.get_output_embeddings() is not None:
        held_out = _held_out(weights, blocks, holdout, device, activations, progress, processes)
    run = CalibratedRun(
        weights,
        blocks,
        names,
        config.codec_of,
        config.calibration,
        shares,
        activations=activations,
        device=device,
        store=store,
        progress=progress,
    )
    run.run()
    model.train(training)
    return QuantizationReport.of(config, run, windows, time.perf_counter() - started, allocation), held_out


def refuse_shared(config: PackedConfig, dataset: Any, processes: Processes) -> None:
    """Reject settings that only one process can follow.

    Raises:
        ValueError: there are several; the message names the setting.
    """
    what = None
    if config.target is not None:
        what = 'bits="auto"'
    elif config.calibration.fisher_groups:
        what = f"fisher_groups={config.calibration.fisher_groups}"
    elif config.calibration.tune_steps:
        what = f"tune_steps={config.calibration.tune_steps}"
    elif dataset is None:
        what = "dataset=None, for which the model writes the text itself,"
    if what is not None and processes.count > 1:
        raise ValueError(
            f"{what} takes the whole model in one process, and {processes.count} were started: start one"
            + (", or name a dataset" if dataset is None else "")
        )


def _held_out(weights: ModelWeights, *options: Any) -> HeldOut | None:
    """The logits of the original, unless they cannot be computed with one block at a time."""
    try:
        return HeldOut(weights, *options)
    except NotBlockByBlock as error:
        logger.warning("the result is not compared with its original: %s. `hf-pcdvq eval` compares them", error)
        return None


def find_tokenizer(config: PackedConfig, model: PreTrainedModel, files: list[str] | None = None) -> Any:
    """The tokenizer that the config holds or names, or else the model's own; None if there is nothing to tokenize.

    Args:
        config: of the calibration.
        model: loaded with `from_pretrained`.
        files: of its checkpoint. Its tokenizer is looked for in the same subfolder and at the same commit; code that comes
            with it is run if the model's own has been, which took the user's consent.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    given = config.tokenizer
    if config.calibration.dataset is None or not isinstance(given, (str, type(None))):
        return given
    from transformers import AutoTokenizer  # which loads what `import hf_pcdvq` need not wait for

    options: dict[str, Any] = {}
    if given is None:
        trusted = type(model).__module__.startswith("transformers_modules.")  # where such code is imported
        options = {"subfolder": _subfolder(model, files), "trust_remote_code": trusted}
        options["revision"] = _commit(model)
    try:
        return AutoTokenizer.from_pretrained(given or model.name_or_path, **options)
    except (OSError, ValueError) as error:
        where = os.path.join(given or model.name_or_path, options.get("subfolder", ""))
        raise ValueError(
            f"the tokenizer to calibrate with could not be loaded from {where}: {error}. Load it yourself and pass it: "
            "config.tokenizer = AutoTokenizer.from_pretrained(...)"
        ) from error


def _subfolder(model: PreTrainedModel, files: list[str] | None) -> str:
    """The folder of checkpoint files in that of the model, or in a snapshot of the cache of the Hub; "" for that itself."""
    if not files:
        return ""
    folder, root, commit = Path(files[0]).parent, Path(model.name_or_path), _commit(model)
    if folder.is_relative_to(root):
        return folder.relative_to(root).as_posix().removeprefix(".")
    parts = folder.parts
    return "/".join(parts[parts.index(commit) + 1 :]) if commit in parts else ""


def _commit(model: PreTrainedModel) -> str | None:
    """The commit of a model on the Hub; None for one in a folder."""
    return getattr(model.config, "_commit_hash", None)


def calibration_device(weights: ModelWeights, asked: torch.device | str | None) -> torch.device:
    """Where to compute: what is asked for, or else the accelerator if there is one, or the device of the weights."""
    if asked is not None:
        return torch.device(asked)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else weights.home


def all_windows(
    model: nn.Module,
    config: PackedConfig,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    work_dir: Path | None,
    identity: Identity | None,
    restart: bool,
    progress: bool,
) -> Tensor:
    """Windows of tokens to calibrate and to measure on, read from the dataset or generated by the model."""
    settings = config.calibration
    count, length, seed = settings.samples + settings.holdout, settings.length, settings.seed
    if dataset is not None:
        return read_windows(dataset, tokenizer, count, length, seed)
    check_length(model, length)

    def generate() -> Tensor:
        return sample_from_model(model, count, length, seed, progress)

    if work_dir is None:
        return generate()
    owner = {**identity, "the settings": f"{count} windows of {length} tokens, seed {seed}"}
    return keep_windows(work_dir, owner, generate, restart)
