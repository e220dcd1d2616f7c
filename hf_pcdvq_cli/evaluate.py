"""`hf-pcdvq eval`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    DTYPES,
    Command,
    command_line,
    echo_json,
    json_option,
    load_model,
    note,
    placement_options,
    progress_wanted,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_pcdvq.evaluation.record import EvaluationRecord, TaskScore


@click.command("eval", cls=Command)
@click.argument("original", metavar="ORIGINAL")
@click.argument("packed", metavar="PACKED")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, UTF-8. [default: the WikiText-2 test text, from the Hub]",
)
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(min=1), help="Use this many windows only. [default: the whole text]")
@click.option(
    "--noise-floor",
    type=click.Choice(DTYPES),
    help="Also compare the original with itself in this dtype, to see the effect of rounding alone.",
)
@click.option("--tasks", metavar="A,B,...", help="Also run these tasks of lm-eval on both models.")
@click.option(
    "--task-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with your own task files, in lm-eval's format.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples per task. [default: all]")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences per batch, for --tasks."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for evaluation.json and evaluation.md. [default: PACKED, if it is a folder]",
)
@click.option("--force", is_flag=True, help="Replace an existing evaluation.json.")
@json_option
@placement_options
@click.pass_context
def evaluate_command(ctx: click.Context, original: str, packed: str, **options: Any) -> None:
    """Compare the model PACKED with the ORIGINAL that it was made from.

    Prints how far the predictions diverge on a text (KL divergence in nats, 0 for identical models), how often the
    most likely next token is the same, and the perplexity of both. Figures for different values of --context are not
    comparable.

    \b
    Examples:
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --context 2048 --windows 32
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --text wiki.txt --noise-floor float32
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --tasks piqa,arc_easy,arc_challenge,hellaswag,winogrande
    """
    from transformers import AutoTokenizer

    from hf_pcdvq.evaluation.metrics import token_windows
    from hf_pcdvq.evaluation.record import check_record_folder
    from hf_pcdvq.files.folders import check_source

    for model in (original, packed):
        check_source(model)
    tasks = [] if options["tasks"] is None else [task.strip() for task in options["tasks"].split(",")]
    if (options["task_dir"] or options["limit"]) and not tasks:
        raise click.UsageError("--task-dir and --limit need --tasks", ctx)
    folder = options["out"] or (Path(packed) if Path(packed).is_dir() else None)
    if folder is not None:
        check_record_folder(folder, options["force"])
    manager = _task_manager(tasks, options["task_dir"])
    tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=options["trust_remote_code"])
    text, source = _read(options["text"])
    windows = token_windows(tokenizer, text, options["context"], options["windows"])

    record = None
    try:
        for record in _measurements(ctx, tokenizer, windows, source, tasks, manager):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                record.write(folder)
    finally:
        if record is not None:
            _show(record, packed, folder, options["as_json"])


def _read(file: Path | None) -> tuple[str, str]:
    """A text and its name."""
    from hf_pcdvq.calibration.texts import read_text
    from hf_pcdvq.evaluation.tasks import WIKITEXT2, wikitext2

    return (wikitext2(), WIKITEXT2) if file is None else (read_text(file), str(file))


def _task_manager(tasks: list[str], folder: Path | None) -> Any:
    from hf_pcdvq.evaluation.tasks import task_manager

    return task_manager(tasks, folder) if tasks else None


def _measurements(
    ctx: click.Context,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    text: str,
    tasks: list[str],
    manager: Any,
) -> Iterator[EvaluationRecord]:
    """Measure everything that was asked for, with at most two models in memory.

    Yields the record whenever it has gained something: what was measured is not lost if a later part fails.
    """
    from hf_pcdvq.evaluation.metrics import evaluate
    from hf_pcdvq.evaluation.record import EvaluationRecord, NoiseFloor, count_bits, hash_tokens
    from hf_pcdvq.files.records import device_name, package_versions

    options = ctx.params
    placement = {name: options[name] for name in ("dtype", "device_map", "trust_remote_code")}
    original, floor = load_model(options["original"], **placement), options["noise_floor"]
    if str(original.dtype) == f"torch.{floor}":
        raise ValueError(f"--noise-floor {floor}: the original is in {floor} itself; choose another dtype")
    packed = load_model(options["packed"], **placement)
    bits_per_packed_weight, bits_per_parameter = count_bits(options["packed"])
    device = device_name(packed.device)
    record = EvaluationRecord(
        original=options["original"],
        packed=options["packed"],
        text=text,
        tokens=hash_tokens(windows),
        metrics=evaluate(original, packed, windows, progress=progress_wanted()),
        noise_floor=None,
        tasks=None,
        bits_per_packed_weight=bits_per_packed_weight,
        bits_per_parameter=bits_per_parameter,
        device=device,
        versions=package_versions(),
        command=command_line(ctx),
    )
    yield record
    if tasks:
        scores, version = _run_tasks(ctx, tokenizer, tasks, manager, original, packed)
        record = replace(record, tasks=scores, versions={**record.versions, "lm_eval": version})
        yield record
    del packed  # makes room for the original in another dtype
    if floor is not None:
        again = load_model(options["original"], **{**placement, "dtype": floor})
        metrics = evaluate(original, again, windows, progress=progress_wanted())
        yield replace(record, noise_floor=NoiseFloor(floor, metrics))


def _show(record: EvaluationRecord, packed: str, folder: Path | None, as_json: bool) -> None:
    if as_json:
        echo_json(record.to_dict())
    else:
        _print_tables(record)
    if folder is None:
        note(f"Not saved: {packed} is not a folder; --out DIR saves the figures")
    else:
        note(f"Saved evaluation.json and evaluation.md in {folder}")


def _run_tasks(
    ctx: click.Context,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    manager: Any,
    original: PreTrainedModel,
    packed: PreTrainedModel,
) -> tuple[list[TaskScore], str]:
    """The scores of both models, and the version of lm-eval."""
    import lm_eval

    from hf_pcdvq.evaluation.record import TaskScore
    from hf_pcdvq.evaluation.tasks import run_tasks

    limits = {"limit": ctx.params["limit"], "batch_size": ctx.params["batch_size"]}
    before, after = (run_tasks(model, tokenizer, tasks, manager, **limits) for model in (original, packed))
    scores = [
        TaskScore(task, metric, score.mean, score.stderr, other.mean, other.stderr, score.samples, score.dataset)
        for (task, metric), score in before.items()
        for other in [after[task, metric]]
    ]
    return scores, lm_eval.__version__


def _print_tables(record: EvaluationRecord) -> None:
    from hf_pcdvq.evaluation.tables import TASK_HEADINGS, task_rows

    from .tables import evaluation_table, plain_table, show

    floor = record.noise_floor
    column = (floor.metrics, f"original, {floor.dtype}") if floor else ()
    show(evaluation_table(record.metrics, *column))
    if record.tasks:
        show(plain_table(TASK_HEADINGS, task_rows(record.tasks), "Tasks, mean ± standard error"))
