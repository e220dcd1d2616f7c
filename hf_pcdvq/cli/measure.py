"""`hf-pcdvq inspect` and `hf-pcdvq eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from .common import Command, load_model, placement_options


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Count the bits of a saved model on its files, without loading it.

    \b
    Example:
      hf-pcdvq inspect qwen-2bit
    """
    from ..report import count_folder, layer_table, left_table, size_table

    count = count_folder(folder)
    if as_json:
        click.echo(json.dumps(count.to_dict(), indent=2))
        return
    console = Console()
    console.print(size_table(count))
    if count.layers:
        console.print(layer_table(count))
    if count.left_unpacked:
        console.print(left_table(count.left_unpacked))


@click.command("eval", cls=Command)
@click.argument("original", metavar="ORIGINAL")
@click.argument("packed", metavar="PACKED")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Text file, UTF-8."
)
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(min=1), help="Use this many windows only. [default: the whole text]")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to this file too."
)
@placement_options
def evaluate_command(
    original: str, packed: str, text: Path, context: int, windows: int | None, json_file: Path | None, **options: Any
) -> None:
    """Compare the model PACKED with the ORIGINAL that it was made from, on a text.

    Prints how far the predictions diverge (KL, in nats; 0 is the same model), how often both find the same next token
    likeliest, and the perplexity of both. Figures for different --context values are not comparable.

    \b
    Example:
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --text wiki.txt --context 2048 --windows 32
    """
    from transformers import AutoTokenizer

    from ..evaluate import evaluate, token_windows
    from ..folders import check_source
    from ..report import evaluation_table

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.ClickException(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    for model in (original, packed):
        check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=options["trust_remote_code"])
    # newline="": line ends are part of the text and must not be translated.
    with text.open(encoding="utf-8", newline="") as stream:
        cut = token_windows(tokenizer, stream.read(), context, windows)
    result = evaluate(load_model(original, **options), load_model(packed, **options), cut)
    Console().print(evaluation_table(result))
    if json_file is not None:
        record = {"original": original, "packed": packed, "text": str(text), **result.to_dict()}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
