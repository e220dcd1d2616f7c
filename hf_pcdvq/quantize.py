"""`quantize_model`: calibrated quantization of a model that is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .calibration.held_out import HeldOut, with_comparison
from .calibration.model import calibrate_model
from .calibration.report import QuantizationReport
from .calibration.settings import Calibration
from .calibration.weights import ModelWeights
from .config import PackedConfig
from .quantizer import PackedHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .processes import Processes


@dataclass(frozen=True)
class Quantized:
    """A model that has been quantized and saved.

    Attributes:
        report: of the calibrated run, without the comparison; None if the weights were rounded.
        compare: the report with the comparison of the model, which is now in a folder, with its original.
    """

    report: QuantizationReport | None
    compare: Callable[[Path], QuantizationReport | None]


def quantize_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PackedConfig,
    dataset: Any = None,
    *,
    device: torch.device | str | None = None,
    batch_tokens: int | None = None,
    work_dir: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
    processes: Processes | None = None,
) -> PreTrainedModel:
    """Quantize a dense model in place, calibrated on a dataset.

    Its linear layers and fused experts are replaced by packed ones, decoder block by decoder block; afterwards the
    model can run, and be saved with `save_pretrained`, like one that was quantized while loading. The measurements of
    the run are in `model.hf_quantizer.report`. An interrupted run leaves the model partly quantized: load it again.

    With `processes=Processes()` in a program that `torchrun` or `accelerate launch` has started several times, all of them call
    this, each with the whole model and the same arguments. Each then takes its share of the windows and of the layers of every
    block, and has the whole packed model in the end. The first alone reads the dataset and uses `work_dir`, and has the
    comparison with the original in its report.

    Args:
        model: on one device; blocks move to `device` one at a time.
        tokenizer: may be None for token tensors and for text that the model generates.
        config: the format, and in `calibration` the options, `Calibration()` if that is None. It is not changed; the
            model's config records a copy.
        dataset: the path of a text or .jsonl file (lines with `"text"` or `"messages"`), the name of a dataset on the
            Hub, a list of texts, of conversations or of token tensors, or a tensor int64 `[n, L]`. None takes what
            `config.calibration` names; if that is None too, the model generates the text.
        device: where blocks are computed; None takes the accelerator if there is one.
        batch_tokens: how many tokens go through a decoder block at once, at least those of one window; None takes 8192
            on an accelerator and one window on a CPU. No more than the windows of one share go at once: of 16, or fewer with at
            least 8 windows each. Another number changes the last bits of Hessians.
        work_dir: folder that keeps finished blocks. An interrupted run resumes if it is called again with the same
            folder, model, settings and versions of packages. None keeps nothing.
        restart: compute again what `work_dir` holds of another run, or damaged, instead of refusing it.
        progress: show the progress.
        processes: those that share the work, see `hf_pcdvq.processes`; None: this one does all of it, whatever others do.

    Returns:
        The same model.

    Raises:
        ValueError: the model is quantized already, is spread over several devices, has no layers to pack, or holds
            values that are not finite; the dataset is unsuitable; or `work_dir` is damaged or belongs to another run.
        NotImplementedError: the decoder blocks cannot be run one by one.
        FileNotFoundError, ImportError: see `calibration.data.read_windows`.
        OSError: `work_dir` cannot be written.
    """
    options: dict[str, Any] = {
        "device": device,
        "batch_tokens": batch_tokens,
        "work_dir": work_dir,
        "restart": restart,
        "progress": progress,
        "processes": processes,
    }
    held_out = quantize_uncompared(model, tokenizer, config, dataset, **options)
    if processes is not None and processes.rank > 0:
        return model
    model.hf_quantizer.report = with_comparison(model.hf_quantizer.report, lambda: ModelWeights(model), held_out)
    return model


def quantize_uncompared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PackedConfig,
    dataset: Any = None,
    *,
    device: torch.device | str | None = None,
    batch_tokens: int | None = None,
    work_dir: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
    processes: Processes | None = None,
) -> HeldOut | None:
    """`quantize_model` without the comparison with the original, so that the model can be saved before it.

    Returns:
        What `with_comparison` completes the report from.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; quantize the original, dense model")
    config = copy.copy(config)
    settings = config.calibration or Calibration()
    if dataset is None:
        dataset = settings.dataset
    config.calibration = replace(settings, dataset=name_of_dataset(dataset))
    quantizer = PackedHfQuantizer(config, pre_quantized=False)
    quantizer.report, held_out = calibrate_model(
        ModelWeights(model),
        quantizer.select(model),
        config,
        dataset,
        tokenizer,
        device=None if device is None else torch.device(device),
        batch_tokens=batch_tokens,
        work_dir=None if work_dir is None else Path(work_dir),
        restart=restart,
        progress=progress,
        processes=processes,
    )
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
    return held_out


def name_of_dataset(dataset: Any) -> str | None:
    """What config.json records of a dataset."""
    if dataset is None:
        return None
    return str(dataset) if isinstance(dataset, (str, Path)) else "given"
