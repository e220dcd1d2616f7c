"""`hf-pcdvq speed`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .common import Command, echo_json, json_option, load_model, note, placement_options, progress_wanted


@click.command(cls=Command)
@click.argument("model")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@json_option
@placement_options
def speed(model: str, prompt_tokens: int, new_tokens: int, as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL generates on this machine; for the model card, the result is saved in MODEL if it is a folder.

    \b
    Example:
      hf-pcdvq speed qwen-2bit --device-map cuda
    """
    from hf_pcdvq.evaluation.speed import measure_speed
    from hf_pcdvq.files.folders import check_source

    check_source(model)
    result = measure_speed(load_model(model, **options), prompt_tokens, new_tokens, progress=progress_wanted())
    if Path(model).is_dir():
        result.write(model)
        note(f"Saved in {Path(model) / 'speed.json'}")
    if as_json:
        echo_json(asdict(result))
    else:
        click.echo(f"{result.tokens_per_second:.1f} tokens per second on {result.device}")
