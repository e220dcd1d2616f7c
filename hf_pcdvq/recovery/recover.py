"""`recover`: trains the scales, norms and biases of a packed model towards its original."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.blocks import find_blocks
from ..calibration.data import read_windows
from ..calibration.identity import Identity, model_identity, update_with_tensor
from ..emulation import is_emulated, placed
from ..evaluation.metrics import check_windows, number_of_tokens
from ..files.records import device_name
from ..modules import packed_modules
from ..processes import Processes
from .report import RecoveryReport, refuse_recovered
from .settings import Recovery
from .state import RunFolder
from .student import as_student
from .teacher import Teacher
from .text import HELD_OUT_TEXT, OWN_TEXT, held_out_windows, name_of, own_windows, source_of
from .trained import TrainedVector
from .training import Training, deterministic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGIT_BYTES = 4 << 30  # of student, teacher and gradient at once, on an accelerator
_CACHE_BYTES = 4 << 30  # of the teacher's logits, on disk
_JUDGE_BYTES = 512 << 20  # of those on held-out text, in memory


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any = None,
    *,
    dataset_name: str | None = None,
    held_out: Any = None,
    settings: Recovery | None = None,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> RecoveryReport:
    """Train a packed model in place to predict what its original predicts.

    Codes stay as they are, and so does the size: trained are a factor for the scale of every row, norms and biases,
    with KL(teacher || model) over the whole vocabulary as the loss. Afterwards the model runs and is saved as before;
    `write` of the report adds the recovery to the provenance of a saved model. If anything fails, the model is as it was.

    Called in several processes (`accelerate launch`, `torchrun`), each takes its share of every step's windows.

    Args:
        model: packed, on one device.
        teacher: the dense model that it was made from, on one device.
        tokenizer: of both; may be None if `dataset` and `held_out` are token tensors.
        dataset: text to train on, in the forms of `quantize_model`: a file, the name of a dataset on the Hub, texts,
            conversations or token tensors int64 `[n, L]`. None: the teacher writes it, unless the model was calibrated
            on something else.
        dataset_name: what the report and the model's card call the text; None takes `dataset` where that is a name.
        held_out: text of another source to judge on, in the same forms. None takes a text that comes with the package.
        settings: the options; None takes `Recovery()`.
        device: where both models are computed, to which they move meanwhile; None takes the accelerator if there is one.
        work_dir: folder that keeps the state: a run that was interrupted goes on if it is called again with the same folder,
            models, text and settings, and gives the same model. None keeps nothing.
        restart: start anew where `work_dir` holds another run, or a damaged one, instead of refusing it.
        progress: write lines with the loss and the time left to standard error.

    Returns:
        The report. `report.notes()` says whether nothing was gained, and whether the model has over-adapted.

    Raises:
        ValueError: the model is not packed or the teacher is; the two or the tokenizer do not belong together; the text
            is unsuitable; a model is spread over several devices; the model was recovered already; or `work_dir` holds another run.
        NotFiniteError: the loss or the gradient became infinite or NaN.
        FileNotFoundError, ImportError: see `calibration.data.read_windows`.
        OSError: `work_dir` cannot be written.
    """
    settings = settings or Recovery()
    _check_models(model, teacher, tokenizer)
    processes = Processes()
    device = _device(model, device, processes)
    folder = None if work_dir is None else Path(work_dir)
    source = source_of(model, dataset)
    with _ready(model), _ready(teacher), ExitStack() as stack:
        identity = _identity(model, teacher, settings) if folder is not None else {}
        judged = held_out_windows(tokenizer, held_out, settings)  # first, because writing text takes long
        if source is not None:
            count = settings.samples or settings.steps * settings.batch
            windows = read_windows(source, tokenizer, count, settings.length, settings.seed)
        else:
            windows = own_windows(teacher, settings, folder, identity, restart, progress, device, processes)
        for text in (windows, judged):
            check_windows(model, text)
        run_folder = None
        if folder is not None:
            owner = {**identity, **_text_identity(windows, judged)}
            if processes.rank == 0:  # which deletes what does not fit
                RunFolder(folder, owner, restart)
            processes.wait()
            run_folder = RunFolder(folder, owner)
        dtype = torch.float32 if is_emulated(model.dtype, device) else model.dtype
        stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
        stack.enter_context(deterministic())
        for one in (model, teacher):
            stack.enter_context(placed(one, device, is_emulated(one.dtype, device)))
        student = stack.enter_context(as_student(model, dtype))
        stack.enter_context(_checkpointing(model, list(student.layers)) if settings.checkpointing else nullcontext())
        trained = TrainedVector(student, stored)
        micro_batch = settings.micro_batch or _micro_batch(windows, teacher, settings, device)
        cache = 0 if run_folder is None else _cache_bytes(windows, settings, device, processes, run_folder.logits)
        logits = run_folder.logits if run_folder is not None else None
        run = Training(
            model,
            trained,
            Teacher(teacher, windows, logits, cache, micro_batch),
            windows,
            Teacher(teacher, judged, None, _JUDGE_BYTES, 1),
            judged,
            settings,
            micro_batch=micro_batch,
            processes=processes,
            folder=run_folder,
            progress=progress,
        )
        try:
            run.run()
            student.keep_changes()
        except BaseException:
            trained.reset()
            raise
        _forget_comparison(model)
        best, after = run.best
        return RecoveryReport(
            settings=settings.to_dict(),
            teacher=teacher.name_or_path or None,
            text=dataset_name or (OWN_TEXT if source is None else name_of(source)),
            held_out=HELD_OUT_TEXT if held_out is None else name_of(held_out),
            windows=min(len(windows), run.progress.step * settings.batch),
            length=windows.shape[1],
            steps=run.progress.step,
            best_step=best,
            parameters=trained.values.numel(),
            seconds=run.progress.seconds,
            seconds_per_step=median(run.step_seconds) if run.step_seconds else None,
            device=device_name(device),
            before=run.before,
            after=after,
            losses=run.progress.losses,
            evaluations=[(step, figures["kl_mean"]) for step, figures in run.progress.evaluations],
        )


# ------------------------------------------------------------------------------------------------------------- checks


def _check_models(model: Any, teacher: Any, tokenizer: Any) -> None:
    if not packed_modules(model):
        raise ValueError(
            f"{type(model).__name__} is not packed, and recovery trains what a packed model stores: quantize it first"
        )
    if model.name_or_path and Path(model.name_or_path).is_dir():
        refuse_recovered(Path(model.name_or_path))
    if packed_modules(teacher):
        raise ValueError(f"the teacher, {type(teacher).__name__}, is packed itself; pass the original, dense model")
    rows = []
    for which, one in (("the packed model", model), ("the teacher", teacher)):
        if one.get_output_embeddings() is None:
            raise ValueError(f"{which}, {type(one).__name__}, has no output head, so it predicts no tokens")
        devices = {parameter.device for parameter in one.parameters()}
        if len(devices) > 1 or devices == {torch.device("meta")}:
            raise ValueError(
                f"recovery needs {which} on one device, it is on {', '.join(sorted(map(str, devices)))}; "
                "load it with device_map='cpu' and name the device to compute on"
            )
        rows.append(number_of_tokens(one))
    if rows[0] != rows[1]:
        raise ValueError(
            f"the packed model has {rows[0]} tokens and the teacher {rows[1]}: they do not share a vocabulary, so the "
            "teacher is not its original"
        )
    if tokenizer is not None and len(tokenizer) > rows[0]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the models {rows[0]}; they do not belong together"
        )


def _device(model: nn.Module, device: torch.device | str | None, processes: Processes) -> torch.device:
    if device is not None:
        return torch.device(device)
    if processes.device is not None:
        return processes.device
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return next(model.parameters()).device


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Without dropout; the training mode of every module is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _checkpointing(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Compute the activations of decoder blocks, which hold `layers`, again in the backward pass.

    Transformers does so in training mode only, which would switch dropout on.
    """
    blocks = list(model.get_submodule(find_blocks(model, layers)))
    own = [vars(block).get("forward") for block in blocks]  # of the object, where hooks have set it
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, forward in zip(blocks, own):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _forget_comparison(model: Any) -> None:
    """Drop the figures of the calibrated run, which are not those of the recovered model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.report is not None:
        quantizer.report = replace(quantizer.report, comparison=None)


# ----------------------------------------------------------------------------------------------------------- the run


def _identity(model: nn.Module, teacher: nn.Module, settings: Recovery) -> Identity:
    """What the result depends on, besides the text."""
    of_model, of_teacher = model_identity(model), model_identity(teacher)
    return {
        **of_model,
        "the teacher's weights": of_teacher["the model's weights"],
        "the teacher's config": of_teacher["the model's config"],
        "the settings": repr(settings),
    }


def _text_identity(windows: Tensor, held_out: Tensor) -> Identity:
    found = {}
    for name, tensor in (("the text", windows), ("the held-out text", held_out)):
        digest = sha256()
        update_with_tensor(digest, name, tensor)
        found[name] = digest.hexdigest()
    return found


def _micro_batch(windows: Tensor, teacher: Any, settings: Recovery, device: torch.device) -> int:
    """Windows that pass through the models at once: one on a CPU, whose caches hold no more activations."""
    if device.type == "cpu":
        return 1
    logits = windows.shape[1] * teacher.get_output_embeddings().weight.shape[0] * 3 * teacher.dtype.itemsize
    return max(1, min(settings.batch, _LOGIT_BYTES // logits))


def _cache_bytes(
    windows: Tensor, settings: Recovery, device: torch.device, processes: Processes, folder: Path
) -> int:
    """How much of the teacher's logits to keep: nothing if no window comes twice, or if processes would share them, and
    unless the settings say how much, no more than half of the space that is free."""
    if settings.steps * settings.batch <= len(windows) or processes.count > 1:
        return 0
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    return min(_CACHE_BYTES, shutil.disk_usage(folder).free // 2) if device.type == "cpu" else 0
