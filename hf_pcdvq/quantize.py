"""`quantize_model`: the calibrated path for a model that is in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .calibration.settings import Calibration
from .config import PackedConfig
from .quantizer import PackedHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PackedConfig,
    calibration: Any = None,
    *,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Quantize a dense model in place, calibrated on data.

    Its linear layers are replaced, decoder block by decoder block, by packed ones; afterwards it can run, and be saved
    with `save_pretrained`, like one that was quantized while loading. The figures of the run are in
    `model.hf_quantizer.report`. If the run is interrupted, the model is left partly quantized: load it again.

    Args:
        model: on one device; blocks travel to `device` one at a time.
        tokenizer: None will do for token tensors and for text that the model writes.
        config: the format; its `calibration` holds the options, `Calibration()` if it is None. It is not changed; what
            the model's config records is a copy.
        calibration: the data: the path of a text or .jsonl file (lines with `"text"` or `"messages"`), the name of a
            data set on the Hub, a list of texts, of conversations or of token tensors, a tensor int64 `[n, L]`; or a
            `Calibration` in place of the config's. None takes what `config.calibration` names; if that is None too,
            the model itself writes the text.
        device: where blocks are computed; None takes the accelerator if there is one.
        work_dir: folder that keeps finished blocks. A run that was interrupted goes on where it stopped, if it is
            called with the same folder, model and settings. None keeps nothing.
        progress: show progress bars.

    Returns:
        The same model.

    Raises:
        ValueError: the model is quantized already, is spread over several devices, has no layers to pack, or holds
            values that are not finite; the data is unsuitable; or `work_dir` belongs to another run.
        NotImplementedError: the decoder blocks cannot be run one by one.
        FileNotFoundError, ImportError: see `calibration.data.read_windows`.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; quantize the original, dense model")
    config = copy.copy(config)
    settings = config.calibration or Calibration()
    if isinstance(calibration, Calibration):
        settings, calibration = calibration, None
    data = settings.data if calibration is None else calibration
    name = str(data) if isinstance(data, (str, Path)) else "given" if data is not None else None
    config.calibration = settings.with_data(name)
    quantizer = PackedHfQuantizer(config, pre_quantized=False)
    quantizer.calibrate(
        model,
        quantizer.select(model),
        data,
        tokenizer,
        None if device is None else torch.device(device),
        None if work_dir is None else Path(work_dir),
        progress,
    )
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
    return model
