"""Shared by the commands: error messages, options of every command that loads a model, and loading it."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("bfloat16", "float16", "float32")
_COMMAND_LINE = "hf_pcdvq.command_line"  # the words after the command's name
_QUIET = "hf_pcdvq.quiet"


class Command(click.Command):
    """A command that reports an error as one message with exit code 1; with `--debug`, as a traceback.

    Progress bars are for terminals, and become lines elsewhere; `--quiet` leaves both out, and the notes on standard error.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        quiet = click.Option(["--quiet", "-q"], is_flag=True, help="No progress, notes or warnings; errors remain.")
        debug = click.Option(["--debug"], is_flag=True, help="Show the Python traceback of an error.")
        self.params += [quiet, debug]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_COMMAND_LINE] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from hf_pcdvq.files.scratch import sigterm_as_exit

        debug, ctx.meta[_QUIET] = ctx.params.pop("debug"), ctx.params.pop("quiet") or not is_first_process()
        try:
            with sigterm_as_exit(), _bars_of_libraries():
                return super().invoke(ctx)
        except (click.UsageError, click.Abort, click.exceptions.Exit):
            raise
        except click.ClickException as error:
            error.message = _whose(printable(error.message))
            raise
        except Exception as error:
            if debug:
                raise
            raise click.ClickException(_whose(printable(_message(error)))) from error


def is_first_process() -> bool:
    """Whether this is the process that tells what happens; the others only report their errors."""
    from hf_pcdvq.processes import launched

    return launched()[0] == 0


def refuse_processes(ctx: click.Context, what: str = "the command") -> None:
    """End a command, or an option of one, for which every process would do the same and write the same folder."""
    from hf_pcdvq.processes import launched, refuse_unlaunched

    refuse_unlaunched()
    if launched()[1] > 1:
        raise click.UsageError(f"{what} runs in one process: start it without torchrun or accelerate launch", ctx)


def _whose(message: str) -> str:
    from hf_pcdvq.processes import launched

    rank, count = launched()
    return message if count == 1 else f"process {rank} of {count}: {message}"


def progress_wanted() -> bool:
    """Whether the running command may show its progress: bars on a terminal, elsewhere a line a minute."""
    return not is_quiet()


def is_quiet() -> bool:
    """Whether the running command has been given `--quiet`."""
    return click.get_current_context().meta[_QUIET]


@contextmanager
def _bars_of_libraries() -> Iterator[None]:
    """Without the bars and, with `--quiet`, the warnings of Transformers and the Hub's library, unless they are wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers

    quiet = click.get_current_context().meta[_QUIET]
    level, ours = transformers.get_verbosity(), logging.getLogger("hf_pcdvq")
    our_level, bars, hub_bars = ours.level, transformers.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if quiet or not sys.stderr.isatty():
        transformers.disable_progress_bar()
        disable_progress_bars()
    if quiet:
        transformers.set_verbosity_error()
        ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        ours.setLevel(our_level)
        if bars:
            transformers.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def command_line(ctx: click.Context) -> str:
    """The command line as typed, quoted for a shell, without the places of files on this machine: it is published."""
    from hf_pcdvq.files.text import word_without_place

    return shlex.join(["hf-pcdvq", ctx.info_name, *map(word_without_place, ctx.meta[_COMMAND_LINE])])


def _message(error: Exception) -> str:
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}. This is unexpected; run the command again with --debug for details"


def placement_options(command: Callable) -> Callable:
    """Options of every command that loads one model."""
    return dtype_option("Dtype of the parameters that are not packed; auto keeps the saved one.")(
        place_options(command)
    )


def dtype_option(text: str) -> Callable:
    """In which dtype a model is loaded, with what the help says of it."""
    return click.option("--dtype", type=click.Choice(("auto", *DTYPES)), default="auto", show_default=True, help=text)


def place_options(command: Callable) -> Callable:
    """Where models are loaded, and whether their code is run."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option(
            "--device-map",
            metavar="MAP",
            help="Where to put the model: auto, cpu, cuda, cuda:1, ... [default: the accelerator, else the CPU]",
        ),
    ):
        command = option(command)
    return command


def loader_stub_option(command: Callable) -> Callable:
    """The option of every command that writes a packed model."""
    return click.option(
        "--loader-stub/--no-loader-stub",
        default=True,
        show_default=True,
        help="With the model, save a module with which trust_remote_code=True loads it without `import hf_pcdvq`.",
    )(command)


def add_stub(folder: Path) -> None:
    """Add the loader stub to a saved model, or say why there is none."""
    from hf_pcdvq.publish.loader_stub import add_loader_stub

    obstacle = add_loader_stub(folder)
    if obstacle is not None:
        note(f"Warning: {obstacle}")


def json_option(command: Callable) -> Callable:
    """The option of every command that prints figures."""
    return click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, and nothing else.")(
        command
    )


def echo_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=2))


def setting_option(command: Callable) -> Callable:
    """The option of every command that chooses how layers are packed."""
    return click.option(
        "--setting",
        default="pcdvq-2.25",
        show_default=True,
        metavar="NAME",
        help="How the layers are packed: pcdvq-2.25, stream-2.0, ccq-2.5 and so on; a wrong name lists them all.",
    )(command)


def skip_option(command: Callable) -> Callable:
    """The option of every command that chooses modules."""
    return click.option(
        "--skip",
        multiple=True,
        metavar="PATTERN",
        help="Leave modules with this name, suffix or regular expression dense. May be repeated.",
    )(command)


def override_option(command: Callable) -> Callable:
    """The option of every command that chooses settings by module."""
    return click.option(
        "--override",
        multiple=True,
        metavar="PATTERN=SETTING",
        help="Another setting for modules in whose names this regular expression is found; none leaves them dense: "
        r'"layers\.[0-6]\..*experts=stream-4.0". May be repeated; the first match applies.',
    )(command)


def vocabulary_options(command: Callable) -> Callable:
    """The options of every command that chooses how embeddings and head are packed."""
    for option in (
        click.option("--head", metavar="SETTING", help="Pack the output head as well, not calibrated: int8, mostly."),
        click.option(
            "--embeddings",
            metavar="SETTING",
            help="Pack the token embeddings as well: int8, mostly. Where the head is tied to them, either option packs both.",
        ),
    ):
        command = option(command)
    return command


def overrides_of(options: tuple[str, ...]) -> dict[str, str | None]:
    """The values of `--override` in the form that a config takes."""
    overrides: dict[str, str | None] = {}
    for option in options:
        pattern, _, setting = option.rpartition("=")
        if not pattern:
            raise click.BadParameter(f"{option!r} is not PATTERN=SETTING", param_hint="--override")
        overrides[pattern] = None if setting == "none" else setting
    return overrides


def load_model(model: str, dtype: str, device_map: str | None, **options: Any) -> PreTrainedModel:
    """Load a model that writes text, packed or not; by default on the accelerator, if there is one. It is loaded whole: one
    that reads images, with what reads them.
    """
    import torch
    from transformers import AutoConfig

    from hf_pcdvq.auto_class import auto_class_of  # which registers the methods with Transformers

    if device_map is None and torch.accelerator.is_available():
        device_map = torch.accelerator.current_accelerator().type
    source = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = AutoConfig.from_pretrained(model, **source)
    return auto_class_of(config).from_pretrained(model, dtype=dtype, device_map=device_map, **options)


# Weights in formats that are not read here.
OTHER_WEIGHTS = ["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.pt", "*.pth", "*.tflite"]


def saved_folder(model: str) -> Path:
    """The folder with a model's files: the one given, or the cache of those on the Hub, which are downloaded."""
    from huggingface_hub import snapshot_download

    from hf_pcdvq.files.folders import check_source

    check_source(model)
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, ignore_patterns=OTHER_WEIGHTS))


def printable(text: str) -> str:
    """The text without what a file of a stranger may have put in to steer the terminal."""
    from hf_pcdvq.files.text import visible

    return visible(text, keep="\n")


def note(text: str) -> None:
    if not is_quiet():
        click.echo(printable(text), err=True)
