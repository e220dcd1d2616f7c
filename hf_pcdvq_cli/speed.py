"""`hf-pcdvq speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import Command, load_model, placement_options


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@placement_options
def speed(folder: Path, prompt_tokens: int, new_tokens: int, **options: Any) -> None:
    """Measure how fast the model in DIR generates on this machine, and save the result in DIR for the model card.

    \b
    Example:
      hf-pcdvq speed qwen-2bit --device-map cuda
    """
    from hf_pcdvq.evaluation.speed import measure_speed

    result = measure_speed(load_model(str(folder), **options), prompt_tokens, new_tokens)
    result.write(folder)
    click.echo(
        f"{result.tokens_per_second:.1f} tokens per second on {result.device}, written to {folder / 'speed.json'}"
    )
