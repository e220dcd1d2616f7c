"""`hf-pcdvq inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .common import Command


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Count the bits of a saved model from its files, without loading it.

    \b
    Example:
      hf-pcdvq inspect qwen-2bit
    """
    from rich.console import Console

    from hf_pcdvq.files.size import count_folder

    from .tables import layer_table, left_table, size_table

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
