"""`hf-pcdvq serve` and `hf-pcdvq chat`: Transformers' own commands, which learn the packed formats first."""

from __future__ import annotations

import click

from .common import Command

# Help is our own, because Transformers' takes seconds to import.
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _run(name: str, arguments: tuple[str, ...]) -> None:
    import typer
    from transformers.cli.transformers import app

    import hf_pcdvq  # noqa: F401  (registers the methods with Transformers)

    try:
        # Not as a command of its own, which would print errors and end the process.
        result = app([name, *arguments], prog_name="transformers", standalone_mode=False)
    # Typer's exceptions are those of Click, or of the copy of Click that it has.
    except (click.ClickException, typer.BadParameter) as error:
        # Transformers adds all of its options, dozens of lines, to the message.
        problem, *_ = error.format_message().splitlines()
        wrong = click.ClickException(f"{problem.removesuffix('.')}; see `transformers {name} --help`")
        wrong.exit_code = error.exit_code
        raise wrong from error
    except typer.Exit as ended:
        raise click.exceptions.Exit(ended.exit_code) from ended
    except typer.Abort as error:
        raise click.Abort from error
    if isinstance(result, int):  # Click returns the exit code that a command ends with
        raise click.exceptions.Exit(result)


@click.command(cls=Command, context_settings=_PASSED_ON)
@click.argument("arguments", metavar="[MODEL] [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Answer requests to an OpenAI-compatible HTTP API: `transformers serve`.

    Takes the options of that command, such as --port, --host and --dtype; `transformers serve --help` lists them.

    \b
    Example (needs `pip install "transformers[serving]"`):
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
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise click.ClickException(
            f"no server answers ({error}); start one in another terminal: hf-pcdvq serve MODEL"
        ) from error
    except httpx.HTTPError as error:
        raise click.ClickException(f"the server answered with an error: {error or type(error).__name__}") from error
