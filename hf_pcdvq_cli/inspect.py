"""`hf-pcdvq inspect`."""

from __future__ import annotations

import click

from .common import Command, echo_json, json_option, saved_folder


@click.command(cls=Command)
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Count the bits of a saved model from its files, without loading it. Those of a model on the Hub are downloaded.

    \b
    Example:
      hf-pcdvq inspect qwen-2bit
    """
    from hf_pcdvq.files.size import count_folder

    from .tables import layer_table, left_table, show, size_table

    count = count_folder(saved_folder(model))
    if as_json:
        echo_json(count.to_dict())
        return
    show(size_table(count))
    if count.layers:
        show(layer_table(count))
    if count.left_unpacked:
        show(left_table(count.left_unpacked))
