"""`allocate_bits`: which layers of a model should get how many bits, without quantizing it for good."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .allocation.report import Allocation
from .allocation.run import allocate
from .allocation.windows import Windows
from .calibration.identity import model_identity
from .calibration.model import all_windows, calibration_device
from .calibration.settings import Calibration
from .calibration.weights import ModelWeights
from .config import PackedConfig
from .quantizer import PackedHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def allocate_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PackedConfig,
    dataset: Any = None,
    *,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> Allocation:
    """Choose the bits of every group of layers of a dense model, which is unchanged in the end.

    `quantize_model` with the same config does this by itself. `config.settled(result.base, dict(result.overrides))` is the
    config that quantizes accordingly.

    Args:
        model: on one device. While sensitivities are measured, all of it is moved to `device`.
        tokenizer: may be None for tokens and for text that the model generates.
        config: with `bits="auto"` and a target; it is not changed.
        dataset: what `quantize_model` accepts, or `Windows`: tokens to calibrate, to probe and to compare on.
        device: where the model is computed; None takes the accelerator if there is one.
        work_dir: folder that keeps finished parts, from which an interrupted call resumes; None keeps nothing.
        restart: compute again what `work_dir` holds of another run, or damaged, instead of refusing it.
        progress: show the progress.

    Raises:
        ValueError: the config has no target, or one outside what its settings can reach; the model is quantized already, has
            no output head or no layers to pack; or the dataset or `work_dir` is unsuitable.
        NotImplementedError: the decoder blocks cannot be run one by one.
        FileNotFoundError, ImportError: see `calibration.data.read_windows`.
        OSError: `work_dir` cannot be written.
    """
    if config.target is None:
        raise ValueError('nothing to allocate: pass a config with bits="auto" and target_bits or target_size')
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; allocate bits to the original, dense model")
    config = copy.copy(config)
    settings = config.calibration or Calibration()
    config.calibration = replace(settings, holdout=0)
    names = PackedHfQuantizer(config, pre_quantized=False).select(model)
    folder = None if work_dir is None else Path(work_dir)
    identity = None if folder is None else model_identity(model)
    if not isinstance(dataset, Windows):
        dataset = settings.dataset if dataset is None else dataset
        dataset = Windows.of(all_windows(model, config, dataset, tokenizer, folder, identity, restart, progress))
    dataset.check_for(model)
    options: dict[str, Any] = {"work_dir": folder, "identity": identity, "restart": restart, "progress": progress}
    return allocate(model, names, config, dataset, device=calibration_device(ModelWeights(model), device), **options)
