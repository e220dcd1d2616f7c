"""`hf-pcdvq quantize`."""

from __future__ import annotations

import json
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .common import (
    Command,
    add_stub,
    command_line,
    echo_json,
    json_option,
    loader_stub_option,
    note,
    override_option,
    overrides_of,
    placement_options,
    refuse_processes,
    setting_option,
    skip_option,
    vocabulary_options,
)
from .mixed import given_allocation, show_allocation, target_fields, target_options, with_allocation
from .quantizing import Run, quantize_and_save
from .recover import check_recovery, check_recovery_options, finish_recovery, recovery_options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from hf_pcdvq.allocation.report import Allocation
    from hf_pcdvq.calibration.settings import Calibration
    from hf_pcdvq.config import PackedConfig
    from hf_pcdvq.quantize import Quantized
    from hf_pcdvq.recovery.report import RecoveryReport

_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def _shard_size(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    # save_pretrained would also refuse it, but only after quantization.
    if not _SHARD_SIZE.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a size like 5GB or 500MB")
    return value


@click.command(cls=Command)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@setting_option
@click.option("--magnitude", type=click.Choice(["norm", "projection"]), help="Of pcdvq only. [default: norm]")
@click.option(
    "--window-bits",
    type=int,
    help="Of stream only: bits per window, 12 to 16; more take longer to encode. [default: 12]",
)
@skip_option
@override_option
@vocabulary_options
@target_options
@click.option(
    "--allocation",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Bits by layer from the allocation.json of hf-pcdvq allocate for this model, instead of --setting.",
)
@click.option(
    "--dataset",
    metavar="DATA",
    help="Text to calibrate on: a .txt or .jsonl file, or the name of a data set on the Hub. "
    "[default: text that the model writes itself]",
)
@click.option("--no-calibration", is_flag=True, help="Round to the nearest codes: quick, and far worse.")
@click.option("--samples", type=click.IntRange(min=1), help="Windows of tokens to calibrate on. [default: 128]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per window. [default: 1024]")
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the windows. [default: 0]")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens that go through a decoder block at once. [default: 8192 on an accelerator, one window on a CPU]",
)
@click.option(
    "--tune-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="After every decoder block, train those that are still dense for N steps to make up for its errors. [default: none]",
)
@click.option("--all-experts", is_flag=True, help="Calibrate every expert on all tokens, wherever they are routed.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for finished parts until the end, from which an interrupted run resumes. [default: beside --out]",
)
@click.option("--gguf-file", metavar="NAME", help="Decode and quantize this GGUF file in MODEL.")
@click.option(
    "--max-shard-size", default="50GB", callback=_shard_size, show_default=True, help="Largest file to write."
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the model in --out, and compute again what --work-dir holds of another run, or damaged.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--recover",
    is_flag=True,
    help="Afterwards, train scales, norms and biases towards the original, on the same text; see hf-pcdvq recover.",
)
@recovery_options
@loader_stub_option
@json_option
@placement_options
@click.pass_context
def quantize(ctx: click.Context, model: str, out: Path, skip: tuple[str, ...], **options: Any) -> None:
    """Quantize MODEL and save it with its tokenizer and a report in a folder.

    The weights of all linear layers except the output head (see --head) are quantized so that the layers' outputs on a calibration
    text change as little as possible. The model need not fit in memory: with --dataset or --no-calibration it is read,
    quantized and written one decoder block at a time. An interrupted run resumes when it is started again. The folder is
    created only when everything has been written.

    Under `torchrun -m hf_pcdvq_cli quantize ...`, several processes share the work: docs/scale.md.

    \b
    Examples:
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2bit --dataset wiki.txt
      hf-pcdvq quantize ./my-model --out my-model-2.5bit --setting stream-2.5
      hf-pcdvq quantize ./my-model --out my-model-2.3bit --setting stream-2.0 --bits auto --target-bits 2.3
      hf-pcdvq quantize ./folder --gguf-file model.Q8_0.gguf --out my-model-2bit --setting pcdvq-2.0
    """
    from hf_pcdvq.allocation.store import kept_until_done
    from hf_pcdvq.files.folders import check_source, folder_in_place
    from hf_pcdvq.files.scratch import scratch_folder
    from hf_pcdvq.files.size import count_folder
    from hf_pcdvq.processes import Processes, launched, refuse_unlaunched

    refuse_unlaunched()
    allocation = given_allocation(ctx)
    config = _quantization_config(ctx, skip, allocation)
    check_recovery_options(ctx)
    for option in ("recover", "gguf_file", "bits"):
        if options[option]:
            refuse_processes(ctx, f"--{option.replace('_', '-')}")
    check_source(model)
    out = out.resolve()
    work_dir = options["work_dir"] or out.with_name(f".{out.name}.calibration")
    started = time.monotonic()
    # They meet here: later, one may download for hours what another has.
    processes = Processes() if launched()[1] > 1 else Processes.alone()
    source = {"revision": options["revision"], "trust_remote_code": options["trust_remote_code"]}
    run = Run(model, source, config, None, out, work_dir, allocation, options, processes)
    if processes.rank > 0:
        _take_part(run)
        return
    with ExitStack() as stack:
        with kept_until_done(work_dir):
            with folder_in_place(out, Path(model), options["force"]) as folder:
                scratch = stack.enter_context(scratch_folder(out.parent))
                result = _quantize_into(folder, run, scratch, command_line(ctx))
            finish_recovery(result.recovery, work_dir)
        report = result.quantized.compare(out)  # after saving, because nothing that happens here may cost the result
        if report is not None:
            report.write(out)
    seconds = time.monotonic() - started
    if options["as_json"]:
        echo_json({**count_folder(out).to_dict(), "comparison": _comparison(out), "seconds": round(seconds, 1)})
    else:
        _print_result(out, model, options["gguf_file"], seconds)
        show_allocation(report)
    if not result.has_tokenizer:
        note("Warning: the model was saved without a tokenizer, see above")


def _take_part(run: Run) -> None:
    """Do a share of what the first process does, which alone writes the model; activations are kept beside it, here too."""
    from hf_pcdvq.files.scratch import scratch_folder

    _dense_config(run.model, run.source)
    run.folder.parent.mkdir(parents=True, exist_ok=True)  # another machine may not have it
    with scratch_folder(run.folder.parent) as scratch:
        quantize_and_save(run, scratch)


class _Result(NamedTuple):
    """A model that has been saved."""

    quantized: Quantized
    has_tokenizer: bool
    recovery: RecoveryReport | None


def _quantization_config(ctx: click.Context, skip: tuple[str, ...], allocation: Allocation | None) -> PackedConfig:
    """The config that the options ask for; an option that does not belong to the setting is wrong usage."""
    from hf_pcdvq.config import config_of_setting

    chosen = {name: ctx.params[name] for name in ("magnitude", "window_bits") if ctx.params[name] is not None}
    common = {"modules_to_not_convert": list(skip) or None, "calibration": _calibration(ctx)}
    common.update({name: ctx.params[name] for name in ("embeddings", "head")})
    overrides, setting = overrides_of(ctx.params["override"]), ctx.params["setting"]
    common.update(target_fields(ctx))
    if allocation is not None:
        setting, overrides = allocation.base, with_allocation(allocation, overrides)
    try:
        for name in chosen:
            if not hasattr(config_of_setting(setting), name):
                raise ValueError(f"--{name.replace('_', '-')} does not belong to the setting {setting}")
        return config_of_setting(setting, overrides=overrides, **common, **chosen)
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error


def _calibration(ctx: click.Context) -> Calibration | None:
    """The calibration that the options ask for; options of it beside --no-calibration are wrong usage."""
    from hf_pcdvq import Calibration

    names = ("samples", "length", "seed", "tune_steps")
    given = {name: ctx.params[name] for name in names if ctx.params[name] is not None}
    if ctx.params["all_experts"]:
        given["all_experts"] = True
    if ctx.params["dataset"] is not None:
        given["dataset"] = ctx.params["dataset"]
    if not ctx.params["no_calibration"]:
        return Calibration(**given)
    if given:
        raise click.UsageError(
            "--no-calibration excludes --dataset, --samples, --length, --seed, --tune-steps and --all-experts", ctx
        )
    return None


def _quantize_into(folder: Path, run: Run, scratch: Path, command: str) -> _Result:
    """Quantize and save the model in this folder; activations may be kept in `scratch`."""
    import torch

    from hf_pcdvq.files.companions import copy_companions
    from hf_pcdvq.files.provenance import Provenance, hub_name, inherited_metadata
    from hf_pcdvq.files.records import package_versions
    from hf_pcdvq.importers.gguf import dense_from_gguf
    from hf_pcdvq.quiet import quiet

    model, source, options, allocation = run.model, run.source, run.options, run.allocation
    inherited, original, given = inherited_metadata(model, options["revision"]), hub_name(model), model
    with ExitStack() as stack:
        if options["gguf_file"]:
            # In the result's folder, because the system's temporary folder may be too small for a dense model, and
            # because a killed run is cleared away with it.
            dense = stack.enter_context(tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder))
            dtype = torch.bfloat16 if options["dtype"] == "auto" else getattr(torch, options["dtype"])
            dense_from_gguf(model, options["gguf_file"], dense, dtype, options["revision"])
            model, source = dense, {}
        model_config = _dense_config(model, source)
        # First, so that what is missing is known before the long part; saving model and tokenizer replaces their files.
        for missing in copy_companions(given, folder, model_config, options["revision"]):
            note(f"Warning: {missing}")
        tokenizer = _tokenizer_or_warning(model, source)
        if options["recover"]:
            check_recovery(given, tokenizer, options)
        stack.enter_context(quiet("hf_pcdvq.quantizer"))  # the command prints its summary as a table
        settled = run._replace(model=model, source=source, tokenizer=tokenizer, folder=folder)
        quantized, recovery = quantize_and_save(settled, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if quantized.report is not None:
            quantized.report.write(folder)
        if allocation is not None:
            allocation.write(folder)
        commit = getattr(model_config, "_commit_hash", None) or options["revision"]
        Provenance(original, commit, command, package_versions(), inherited).write(folder)
        if recovery is not None:
            recovery.write(folder)
        if options["loader_stub"]:
            add_stub(folder)
    return _Result(quantized, tokenizer is not None, recovery)


def _dense_config(model: str, source: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model that is not quantized yet."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, **source)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return config
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    raise click.ClickException(
        f"{model} is already quantized with {getattr(method, 'value', method)}; quantize the original, dense model"
    )


def _tokenizer_or_warning(model: str, source: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    # Some classes load without their files, as a tokenizer with special tokens only.
    problem = "the tokenizer there has special tokens only"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        if len(tokenizer) > len(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as error:
        problem = str(error)
    note(f"Warning: no tokenizer was found with the model, so none is saved: {problem}")
    return None


def _print_result(out: Path, model: str, gguf_file: str | None, seconds: float) -> None:
    from hf_pcdvq.evaluation.metrics import Evaluation
    from hf_pcdvq.files.folders import weight_bytes
    from hf_pcdvq.files.size import count_folder, readable_size

    from .tables import evaluation_table, left_table, show, size_table

    count, comparison = count_folder(out), _comparison(out)
    if count.left_unpacked:
        show(left_table(count.left_unpacked))
    show(size_table(count))
    if comparison is not None:
        show(evaluation_table(Evaluation(**comparison)))
    size = readable_size(count.file_bytes)
    if Path(model).is_dir():
        size = f"{readable_size(weight_bytes(Path(model), gguf_file))} -> {size}"
    click.echo(f"Saved in {out}: {size}, {count.bits_per_packed_weight:.3f} bits per packed weight, {seconds:.1f} s")


def _comparison(out: Path) -> dict[str, Any] | None:
    """How the result compares with the original, if a calibrated run measured it."""
    from hf_pcdvq.calibration.report import NAME

    file = out / f"{NAME}.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"comparison": None}
    if report.get("comparison_failure"):
        note(
            f"Warning: the comparison with the original failed: {report['comparison_failure']}. The model is saved; "
            "hf-pcdvq eval measures it"
        )
    return report["comparison"]
