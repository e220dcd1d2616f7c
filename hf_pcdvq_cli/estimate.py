"""`hf-pcdvq estimate`."""

from __future__ import annotations

import json

import click

from .common import Command, override_option, overrides_of, setting_option


@click.command(cls=Command)
@click.argument("model", metavar="CONFIG.json|MODEL")
@setting_option
@override_option
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave modules with this name, suffix or regular expression dense.",
)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Tokens in the key-value cache that memory is estimated for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def estimate(
    model: str, setting: str, override: tuple[str, ...], skip: tuple[str, ...], context: int, as_json: bool
) -> None:
    """Estimate the size of a packed model from its configuration alone.

    Only the configuration is downloaded, and no weights are allocated.

    \b
    Example:
      hf-pcdvq estimate Qwen/Qwen3-30B-A3B --setting stream-2.0 --override "self_attn=int8"
    """
    from rich.console import Console

    from hf_pcdvq.config import config_of_setting
    from hf_pcdvq.estimate import estimate as run
    from hf_pcdvq.estimate import estimate_table, read_model_config

    from .tables import left_table

    options = {"overrides": overrides_of(override), "modules_to_not_convert": list(skip) or None}
    config = config_of_setting(setting, **options)
    result = run(read_model_config(model), config, context)
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "left_unpacked": config.left_unpacked}, indent=2))
        return
    console = Console()
    console.print(left_table(config.left_unpacked))
    console.print(estimate_table(result))
