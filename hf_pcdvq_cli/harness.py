"""`hf-pcdvq lm-eval`: the command of lm-eval, which learns the packed formats first."""

from __future__ import annotations

import sys

import click

from .common import Command


@click.command(
    "lm-eval", cls=Command, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("arguments", metavar="[run | ls | validate] [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command on packed models: `lm_eval`.

    Takes the options of that command; `lm_eval run --help` lists them. `hf-pcdvq eval --tasks` compares two models.

    \b
    Example (needs `pip install lm-eval`):
      hf-pcdvq lm-eval run --model hf --model_args pretrained=qwen-2bit --tasks piqa
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise click.ClickException("this needs the package lm-eval: pip install lm-eval") from error

    import hf_pcdvq  # noqa: F401  (registers the methods with Transformers)

    sys.argv = ["lm_eval", *arguments]  # it reads the command line of the process only
    cli_evaluate()
