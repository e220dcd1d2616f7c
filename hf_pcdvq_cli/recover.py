"""`hf-pcdvq recover`, and the options that `hf-pcdvq quantize --recover` shares with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    Command,
    add_stub,
    command_line,
    dtype_option,
    echo_json,
    is_quiet,
    json_option,
    load_model,
    loader_stub_option,
    note,
    place_options,
    refuse_processes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_pcdvq.recovery.report import RecoveryReport
    from hf_pcdvq.recovery.settings import Recovery


_FOLDER = ".recovery"  # in the work folder of a quantization
# Settings that are options of both commands.
_OPTIONS = ("steps", "batch", "learning_rate", "checkpointing", "seed")


def recovery_options(command: Callable) -> Callable:
    """The options of a recovery, by the names of its settings."""
    for option in (
        click.option("--checkpointing", is_flag=True, help="Recovery: compute activations twice, to save memory."),
        click.option(
            "--held-out",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Recovery: text of another source to judge on. [default: one that comes with the package]",
        ),
        click.option("--learning-rate", type=click.FloatRange(min=0, max=1), help="Recovery: the largest rate."),
        click.option("--batch", type=click.IntRange(min=1), help="Recovery: windows per step."),
        click.option("--steps", type=click.IntRange(min=1), help="Recovery: steps of training."),
    ):
        command = option(command)
    return command


def _settings(options: dict[str, Any], names: tuple[str, ...]) -> Recovery:
    """The settings that options ask for; those that are not given keep their defaults."""
    from hf_pcdvq import Recovery

    return Recovery(**{name: options[name] for name in names if options[name] is not None})


@click.command("recover", cls=Command)
@click.argument("packed", metavar="PACKED", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--teacher", required=True, metavar="MODEL", help="The original that PACKED was made from.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--dataset",
    metavar="DATA",
    help="Text to train on: a .txt or .jsonl file, or the name of a data set on the Hub. "
    "[default: text that the original writes itself, if PACKED was calibrated on such text]",
)
@recovery_options
@click.option("--samples", type=click.IntRange(min=1), help="Different windows to train on. [default: by steps]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per window.")
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the windows and their order. [default: 0]")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the state until the end, from which an interrupted run resumes. [default: beside --out]",
)
@click.option(
    "--force", is_flag=True, help="Replace the model in --out, and start anew where --work-dir does not fit."
)
@loader_stub_option
@json_option
@dtype_option("Dtype of the original; auto keeps the saved one. PACKED keeps its own.")
@place_options
@click.pass_context
def recover_command(ctx: click.Context, packed: Path, teacher: str, out: Path, **options: Any) -> None:
    """Train the scales, norms and biases of the model in PACKED to predict what its original predicts.

    The codes stay as they are, and the files as large as they are. An interrupted run resumes when it is started again.
    The folder is created only when everything has been written.

    \b
    Examples:
      hf-pcdvq recover qwen-2bit --teacher Qwen/Qwen3-0.6B --out qwen-2bit-recovered
      hf-pcdvq recover packed --teacher ./original --out recovered --dataset c4.txt --steps 400
    """
    from hf_pcdvq.files.folders import check_destination, check_source, folder_in_place
    from hf_pcdvq.recovery.report import refuse_recovered
    from hf_pcdvq.recovery.state import clear

    refuse_processes(ctx)  # recover() in Python knows several
    check_source(teacher)
    refuse_recovered(packed)
    settings, out = _settings(options, (*_OPTIONS, "samples", "length")), out.resolve()
    check_destination(out, Path(teacher), options["force"])  # PACKED is protected by folder_in_place
    work_dir = options["work_dir"] or out.with_name(f".{out.name}.recovery")
    started = time.monotonic()
    with folder_in_place(out, packed, options["force"]) as folder:
        report = _recover_into(ctx, folder, packed, teacher, settings, work_dir)
    clear(work_dir)
    _show(report)
    seconds = time.monotonic() - started
    if options["as_json"]:
        echo_json({**report.to_dict(), "total_seconds": round(seconds, 1)})
    else:
        click.echo(f"Saved in {out}: {report.steps} steps, {seconds:.1f} s")


def _recover_into(
    ctx: click.Context, folder: Path, packed: Path, teacher: str, settings: Recovery, work_dir: Path
) -> RecoveryReport:
    """Recover a packed model and save it."""
    from transformers import AutoTokenizer

    from hf_pcdvq.files.companions import copy_companions

    options = ctx.params
    source = {"trust_remote_code": options["trust_remote_code"]}
    # On the CPU: both move to the accelerator while they are trained. In its own dtype, in which it is saved again.
    model = load_model(str(packed), "auto", options["device_map"] or "cpu", **source)
    tokenizer = AutoTokenizer.from_pretrained(packed, **source)
    for missing in copy_companions(str(packed), folder, model.config):
        note(f"Warning: {missing}")
    report = _run(model, teacher, tokenizer, settings, options, work_dir, source, options["dataset"])
    model.save_pretrained(folder, max_shard_size="50GB")
    tokenizer.save_pretrained(folder)
    report.write(folder, command_line(ctx), base=packed)
    if options["loader_stub"]:
        add_stub(folder)
    return report


def recover_quantized(
    model: PreTrainedModel,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
    work_dir: Path,
    source: dict[str, Any],
) -> RecoveryReport:
    """Recover a model that `hf-pcdvq quantize` has packed. `source` says where the original, its teacher, is loaded from.

    It is trained on what it was calibrated on, and on nothing that it will be compared on.
    """
    from hf_pcdvq.recovery.text import calibrated_windows

    calibration, dataset, name = model.hf_quantizer.quantization_config.calibration, None, None
    if calibration is not None:
        dataset, name = calibrated_windows(replace(calibration, dataset=options["dataset"]), tokenizer, work_dir)
    settings, folder = _settings(options, _OPTIONS), work_dir / _FOLDER
    return _run(model, teacher, tokenizer, settings, options, folder, source, dataset, name)


def check_recovery(teacher: str, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]) -> None:
    """What would end a recovery, found before the quantization, which takes long.

    Raises:
        ValueError: there is no tokenizer, or the held-out text is unsuitable.
    """
    from hf_pcdvq.recovery.text import held_out_windows

    if tokenizer is None:
        raise ValueError(f"--recover needs a tokenizer to judge on held-out text, and {teacher} has none")
    held_out_windows(tokenizer, options["held_out"], _settings(options, _OPTIONS))


def check_recovery_options(ctx: click.Context) -> None:
    """Options of a recovery that `hf-pcdvq quantize` is not asked for are wrong usage."""
    given = [name for name in ("steps", "batch", "learning_rate", "held_out", "checkpointing") if ctx.params[name]]
    if given and not ctx.params["recover"]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --recover", ctx)


def finish_recovery(report: RecoveryReport | None, work_dir: Path) -> None:
    """Delete the state of a recovery, of an earlier run too, once `hf-pcdvq quantize` has saved its result, and show
    what it did."""
    from hf_pcdvq.recovery.state import clear

    clear(work_dir / _FOLDER)
    if report is not None:
        _show(report)


def _run(
    model: PreTrainedModel,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Recovery,
    options: dict[str, Any],
    work_dir: Path,
    source: dict[str, Any],
    dataset: Any,
    dataset_name: str | None = None,
) -> RecoveryReport:
    """Load the teacher and recover a packed model in memory.

    Raises:
        ValueError: the teacher numbers tokens differently.
    """
    from transformers import AutoTokenizer

    from hf_pcdvq.recovery.recover import recover

    if AutoTokenizer.from_pretrained(teacher, **source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{teacher} numbers tokens differently than the packed model's tokenizer: it is not its original"
        )
    return recover(
        model,
        load_model(teacher, options["dtype"], options["device_map"] or "cpu", **source),
        tokenizer,
        dataset,
        dataset_name=dataset_name,
        held_out=options["held_out"],
        settings=settings,
        work_dir=work_dir,
        restart=options["force"],
        progress=not is_quiet(),
    )


def _show(report: RecoveryReport) -> None:
    """What a recovery did, and what a user has to know of it."""
    before, after = report.before, report.after
    note(
        f"Recovered in {report.seconds:.0f} s: on {report.held_out}, KL {before.kl_mean:.3f} -> {after.kl_mean:.3f} nats, "
        f"perplexity {before.perplexity_packed:.2f} -> {after.perplexity_packed:.2f} (original "
        f"{after.perplexity_original:.2f})"
    )
    for text in report.notes():
        note(f"Warning: {text}")
