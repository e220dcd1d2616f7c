"""`hf-pcdvq serve` and `hf-pcdvq chat`: Transformers' own commands, which learn the packed formats first."""

from __future__ import annotations

import click

from .common import Command

# Help is our own, because Transformers' takes seconds to import.
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _run(name: str, arguments: tuple[str, ...]) -> None:
    from transformers.cli.transformers import app

    import hf_pcdvq  # noqa: F401  (registers the methods with Transformers)

    # Not as a command of its own: errors and exit codes are ours.
    app([name, *arguments], prog_name="hf-pcdvq", standalone_mode=False)


@click.command(cls=Command, context_settings=_PASSED_ON)
@click.argument("arguments", metavar="[MODEL] [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Answer requests to an OpenAI-compatible HTTP API: `transformers serve`.

    Takes the options of that command, such as --port, --host and --dtype; `transformers serve --help` lists them.

    \b
    Example (needs `pip install "hf_pcdvq[serving]"`):
      hf-pcdvq serve qwen-2bit --port 8000
    """
    _run("serve", arguments)


@click.command(cls=Command, context_settings=_PASSED_ON)
@click.argument("arguments", metavar="MODEL [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def chat(arguments: tuple[str, ...]) -> None:
    """Chat in the terminal with a model that `hf-pcdvq serve` serves: `transformers chat`.

    Takes the options of that command; `transformers chat --help` lists them.

    \b
    Example, while `hf-pcdvq serve qwen-2bit` runs in another terminal:
      hf-pcdvq chat qwen-2bit http://localhost:8000
    """
    from huggingface_hub.utils import httpx

    try:
        _run("chat", arguments)
    except httpx.ConnectError as error:
        raise click.ClickException(
            f"no server answers ({error}); start one in another terminal: hf-pcdvq serve MODEL"
        ) from error
