"""`hf-pcdvq allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import (
    Command,
    echo_json,
    json_option,
    load_model,
    note,
    override_option,
    overrides_of,
    placement_options,
    progress_wanted,
    refuse_processes,
    setting_option,
    skip_option,
    vocabulary_options,
)
from .mixed import print_allocation, target_fields, target_options


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for allocation.json, allocation.md and allocation.png, and for finished parts until the end.",
)
@setting_option
@target_options
@skip_option
@override_option
@vocabulary_options
@click.option(
    "--dataset",
    metavar="DATA",
    help="Text to measure on: a .txt or .jsonl file, or the name of a data set on the Hub. "
    "[default: text that the model writes itself]",
)
@click.option("--samples", type=click.IntRange(min=3), default=48, show_default=True, help="Windows of tokens.")
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the windows.")
@click.option("--force", is_flag=True, help="Replace what --out holds of another allocation.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@json_option
@placement_options
@click.pass_context
def allocate(ctx: click.Context, model: str, out: Path, skip: tuple[str, ...], **options: Any) -> None:
    """Choose the bits of every layer of MODEL for a size, without quantizing it.

    What quantization at the lowest rate does to the predictions is measured for one group of layers at a time. The result is
    compared with the uniform setting, and the better of the two is kept. An interrupted run resumes when it is started again.

    \b
    Example:
      hf-pcdvq allocate Qwen/Qwen3-0.6B --out bits --setting stream-2.0 --bits auto --target-bits 2.3 --dataset wiki.txt
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2.3bit --allocation bits/allocation.json --dataset wiki.txt
    """
    from transformers import AutoTokenizer

    from hf_pcdvq import Calibration, allocate_bits
    from hf_pcdvq.allocation.report import FILES
    from hf_pcdvq.allocation.store import clear_all
    from hf_pcdvq.config import config_of_setting
    from hf_pcdvq.files.folders import check_source

    refuse_processes(ctx)
    fields = target_fields(ctx)
    if not fields:
        raise click.UsageError("give --bits auto with --target-bits or --target-size", ctx)
    calibration = Calibration(**{name: options[name] for name in ("dataset", "samples", "length", "seed")}, holdout=0)
    fields |= {name: options[name] for name in ("embeddings", "head")}
    fields |= {"overrides": overrides_of(options["override"]), "modules_to_not_convert": list(skip) or None}
    try:
        config = config_of_setting(options["setting"], calibration=calibration, **fields)
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error
    check_source(model)
    if (out / FILES[0]).exists() and not options["force"]:
        raise click.ClickException(f"{out / FILES[0]} exists: choose another --out, or replace it with --force")
    source = {"revision": options["revision"], "trust_remote_code": options["trust_remote_code"]}
    tokenizer = None if calibration.dataset is None else AutoTokenizer.from_pretrained(model, **source)
    loaded = load_model(model, options["dtype"], options["device_map"] or "cpu", **source)
    work_dir = out / ".parts"
    allocation = allocate_bits(
        loaded, tokenizer, config, work_dir=work_dir, restart=options["force"], progress=progress_wanted()
    )
    allocation.write(out)
    clear_all(work_dir)
    if options["as_json"]:
        echo_json(allocation.to_dict())
        return
    print_allocation(allocation)
    note(f"Saved {', '.join(file for file in FILES if (out / file).is_file())} in {out}")
