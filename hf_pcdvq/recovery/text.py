"""The text of a recovery: what is trained on, and what is judged on."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.data import read_windows, split_windows
from ..calibration.identity import Identity
from ..calibration.sampling import sample_from_model
from ..calibration.settings import Calibration
from ..calibration.store import keep_windows, kept_windows
from ..emulation import placed
from ..evaluation.metrics import check_length
from ..processes import Processes
from .settings import Recovery
from .state import text_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_OWN_WINDOWS = 64  # of text that the model writes, at most: it takes a minute on two cores
_HELD_OUT_SEED = 0  # whatever the run's: what is judged on must not change with the order of the training
OWN_TEXT = "text that the original wrote"
HELD_OUT_TEXT = "the text in hf_pcdvq/recovery/data/held_out.txt"


def source_of(model: Any, dataset: Any) -> Any:
    """What to train on; None for text that the teacher writes.

    Raises:
        ValueError: no dataset is given, and the model was calibrated on one, which is not here.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    calibration = None if quantizer is None else quantizer.quantization_config.calibration
    if dataset is None and calibration is not None and calibration.dataset is not None:
        raise ValueError(
            f"the model was calibrated on {calibration.dataset!r}, which is known by this name only: pass it, or other "
            "text, as dataset"
        )
    return dataset


def calibrated_windows(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None, work_dir: Path
) -> tuple[Tensor, str]:
    """The windows int64 `[n, L]` that a model has just been calibrated on, without those held out, and their name.

    Args:
        calibration: its settings.
        tokenizer: may be None where the model has written the text.
        work_dir: of the calibration, which keeps what the model has written.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `calibration.data.read_windows`; or nothing is kept.
    """
    if calibration.dataset is None:
        windows, name = kept_windows(work_dir), OWN_TEXT
        if windows is None:
            raise ValueError(f"{work_dir} does not hold the text that the model was calibrated on")
    else:
        count = calibration.samples + calibration.holdout
        windows = read_windows(calibration.dataset, tokenizer, count, calibration.length, calibration.seed)
        name = str(calibration.dataset)
    return split_windows(windows, calibration)[0], name


def own_windows(
    teacher: Any,
    settings: Recovery,
    folder: Path | None,
    identity: Identity,
    restart: bool,
    progress: bool,
    device: torch.device,
    processes: Processes,
) -> Tensor:
    """Windows of tokens that the teacher writes, to train on; kept in the folder, if there is one."""
    check_length(teacher, settings.length)
    count = settings.samples or min(settings.steps * settings.batch, _OWN_WINDOWS)

    def write() -> Tensor:
        with placed(teacher, device, False):
            return sample_from_model(teacher, count, settings.length, settings.seed, progress)

    def read_or_write() -> Tensor:
        return write() if folder is None else keep_windows(text_folder(folder), identity, write, restart)

    return processes.from_first(read_or_write)


def held_out_windows(tokenizer: PreTrainedTokenizerBase | None, held_out: Any, settings: Recovery) -> Tensor:
    """Windows of tokens to judge on, int64 `[m, L]`. A warning says if there are fewer than the settings ask for.

    Args:
        held_out: what `read_windows` accepts; None takes the text that comes with the package.

    Raises:
        ValueError: the text is shorter than one window or has no known form, or it needs a tokenizer and there is none.
        FileNotFoundError, ImportError: see `read_windows`.
    """
    if held_out is None:
        if tokenizer is None:
            raise ValueError("without a tokenizer, held_out must be token windows to judge on, int64 [n, L]")
        held_out = [(files(__package__) / "data" / "held_out.txt").read_text(encoding="utf-8")]
    try:
        windows = read_windows(held_out, tokenizer, settings.held_out, settings.length, _HELD_OUT_SEED)
    except ValueError as error:
        raise ValueError(f"the held-out text cannot be judged on: {error}") from error
    if len(windows) < settings.held_out:
        logger.warning(
            "the held-out text has %d windows of %d tokens, not %d: all are judged on",
            *(len(windows), windows.shape[1], settings.held_out),
        )
    return windows


def name_of(source: Any) -> str:
    """What a report calls a text."""
    return str(source) if isinstance(source, (str, Path)) else "data given in Python"
