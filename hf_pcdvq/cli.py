"""The console script `hf-pcdvq`: quantize a model, look into a packed one, measure it, try it.

Exit codes: 0 done, 1 an error (one message on stderr, the traceback with `--debug`), 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch, Transformers and the rest of the package are imported inside the commands: help should not wait for them.
import click
from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import PackedConfig

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


class _Command(click.Command):
    """A command that reports an error as one message with exit code 1, and has `--debug` to see where it came from."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="On an error, show the Python traceback."))

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if debug:
                raise
            raise click.ClickException(_message(error)) from error


def _message(error: Exception) -> str:
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}. This was not foreseen; run the command again with --debug to see more"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf_pcdvq")
def main() -> None:
    """Language models at 2 to 3 bits per weight, for Hugging Face Transformers.

    MODEL is always a folder that holds a saved model, or the name of one on the Hugging Face Hub.

    \b
    Example, from a model to a small copy of it that has been measured:
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2bit
      hf-pcdvq inspect qwen-2bit
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --text wiki.txt
      hf-pcdvq generate qwen-2bit --prompt "What is a codebook?"
    """


def _placement_options(command: Callable) -> Callable:
    """Options of every command that loads a model."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option(
            "--device-map",
            metavar="MAP",
            help="Where the model goes: auto, cpu, cuda, cuda:1, ... [default: the accelerator, else the CPU]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(_DTYPES),
            default="auto",
            show_default=True,
            help="Floating dtype of what is not packed; auto keeps the saved one.",
        ),
    ):
        command = option(command)
    return command


# ------------------------------------------------------------------------------------------------------------ quantize


def _shard_size(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    # save_pretrained would refuse it too, but only after the model has been quantized.
    if not _SHARD_SIZE.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a size like 5GB or 500MB")
    return value


@main.command(cls=_Command)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--method",
    type=click.Choice(["pcdvq", "ccq"]),
    default="pcdvq",
    show_default=True,
    help="pcdvq: polar vector quantization. ccq: convolutional codes.",
)
@click.option("--bits", type=click.Choice(["2.0", "2.25"]), help="pcdvq only: bits per weight. [default: 2.25]")
@click.option("--magnitude", type=click.Choice(["projection", "norm"]), help="pcdvq only. [default: projection]")
@click.option(
    "--layout",
    type=click.Choice(["2.75", "2.5", "2.0625"]),
    help="ccq only: the published layout, named by its bits per weight. [default: 2.5]",
)
@click.option(
    "--hadamard/--no-hadamard",
    default=None,
    help="ccq only: rotate the inputs; off is the published form, and far worse. [default: on]",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave the modules of this name, suffix or regular expression as they are. May be given several times.",
)
@click.option("--gguf-file", metavar="NAME", help="MODEL holds this GGUF file: decode it and quantize that.")
@click.option(
    "--max-shard-size", default="50GB", callback=_shard_size, show_default=True, help="Largest file to write."
)
@click.option("--force", is_flag=True, help="Replace the model that --out holds.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@_placement_options
@click.pass_context
def quantize(ctx: click.Context, model: str, out: Path, skip: tuple[str, ...], **options: Any) -> None:
    """Quantize MODEL and save it with its tokenizer in a folder.

    The weights of all linear layers but the output head are rounded to the nearest codes while the model loads; no
    data is needed. The folder appears when everything is written; if anything goes wrong there is none.

    \b
    Examples:
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2bit
      hf-pcdvq quantize ./my-model --out my-model-ccq --method ccq --layout 2.5
      hf-pcdvq quantize ./folder --gguf-file model.Q8_0.gguf --out my-model-2bit --bits 2.0
    """
    from .folders import check_source, folder_in_place

    config = _quantization_config(ctx, skip)
    check_source(model)
    out = out.resolve()
    started = time.monotonic()
    with folder_in_place(out, Path(model), options["force"]) as folder:
        has_tokenizer = _quantize_into(folder, model, config, options)
    _print_result(out, model, options["gguf_file"], time.monotonic() - started)
    if not has_tokenizer:
        _note("Warning: the model was saved without a tokenizer, see above")


def _quantization_config(ctx: click.Context, skip: tuple[str, ...]) -> PackedConfig:
    """The config that the options ask for; an option of the other method is wrong usage."""
    from . import CcqConfig, PcdvqConfig

    methods = {"pcdvq": ("bits", "magnitude"), "ccq": ("layout", "hadamard")}
    method = ctx.params["method"]
    for owner, names in methods.items():
        for name in names:
            if owner != method and ctx.params[name] is not None:
                raise click.UsageError(f"--{name} belongs to --method {owner}, but the method is {method}", ctx)
    chosen = {name: ctx.params[name] for name in methods[method] if ctx.params[name] is not None}
    if "bits" in chosen:
        chosen["bits"] = float(chosen["bits"])
    return {"pcdvq": PcdvqConfig, "ccq": CcqConfig}[method](modules_to_not_convert=list(skip) or None, **chosen)


def _quantize_into(folder: Path, model: str, config: PackedConfig, options: dict[str, Any]) -> bool:
    """Quantize and save. Returns whether there was a tokenizer to save."""
    import torch

    from .gguf import dense_from_gguf

    source = {"revision": options["revision"], "trust_remote_code": options["trust_remote_code"]}
    with ExitStack() as stack:
        if options["gguf_file"]:
            # Beside the result, because the system's temporary folder may be too small for a dense model.
            dense = stack.enter_context(tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent))
            dtype = torch.bfloat16 if options["dtype"] == "auto" else getattr(torch, options["dtype"])
            dense_from_gguf(model, options["gguf_file"], dense, dtype, options["revision"])
            model, source = dense, {}
        _refuse_quantized(model, source)
        tokenizer = _tokenizer_or_warning(model, source)
        with _without_summary():
            loaded = _load(model, options["dtype"], options["device_map"], quantization_config=config, **source)
        loaded.save_pretrained(folder, max_shard_size=options["max_shard_size"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return tokenizer is not None


def _refuse_quantized(model: str, source: dict[str, Any]) -> None:
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(model, **source), "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    raise click.ClickException(
        f"{model} is already quantized with {getattr(method, 'value', method)}; quantize the original, dense model"
    )


def _tokenizer_or_warning(model: str, source: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    # Some classes come up without their files, as a tokenizer of special tokens only.
    problem = "what is there knows special tokens only"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        if len(tokenizer) > len(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as error:
        problem = str(error)
    _note(f"Warning: no tokenizer was found beside the model, so none is saved with it: {problem}")
    return None


@contextmanager
def _without_summary() -> Iterator[None]:
    """Silence the quantizer's summary, which the command prints as a table."""
    logger = logging.getLogger("hf_pcdvq.quantizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(model: str, dtype: str, device_map: str | None, **options: Any) -> PreTrainedModel:
    """A causal language model, packed or not, on the accelerator if there is one and nothing else is asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_pcdvq  # noqa: F401  (registers the methods with Transformers)

    if device_map is None and torch.accelerator.is_available():
        device_map = torch.accelerator.current_accelerator().type
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device_map, **options)


def _print_result(out: Path, model: str, gguf_file: str | None, seconds: float) -> None:
    from .folders import weight_bytes
    from .report import count_folder, left_table, readable_size, size_table

    count = count_folder(out)
    console = Console()
    console.print(left_table(count))
    console.print(size_table(count))
    size = readable_size(count.file_bytes)
    if Path(model).is_dir():
        size = f"{readable_size(weight_bytes(Path(model), gguf_file))} -> {size}"
    click.echo(f"Saved in {out}: {size}, {count.bits_per_packed_weight:.3f} bits per packed weight, {seconds:.1f} s")


# ------------------------------------------------------------------------------------------- inspect, eval, generate


@main.command(cls=_Command)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Count the bits of a saved model on its files, without loading it.

    \b
    Example:
      hf-pcdvq inspect qwen-2bit
    """
    from .report import count_folder, layer_table, left_table, size_table

    count = count_folder(folder)
    if as_json:
        click.echo(json.dumps(count.to_dict(), indent=2))
        return
    console = Console()
    console.print(size_table(count))
    if count.layers:
        console.print(layer_table(count))
    if count.left_unpacked:
        console.print(left_table(count))


@main.command("eval", cls=_Command)
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
@_placement_options
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

    from .evaluate import evaluate, token_windows
    from .folders import check_source
    from .report import evaluation_table

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.ClickException(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    for model in (original, packed):
        check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=options["trust_remote_code"])
    # newline="": line ends are part of the text and must not be translated.
    with text.open(encoding="utf-8", newline="") as stream:
        cut = token_windows(tokenizer, stream.read(), context, windows)
    result = evaluate(_load(original, **options), _load(packed, **options), cut)
    Console().print(evaluation_table(result))
    if json_file is not None:
        record = {"original": original, "packed": packed, "text": str(text), **result.to_dict()}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@main.command(cls=_Command)
@click.argument("model", metavar="DIR")
@click.option("--prompt", required=True, help="What the model is to answer or to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Put the prompt into the model's chat template, or let it continue the bare text. "
    "[default: chat if the tokenizer has a template]",
)
@click.option("--seed", type=int, help="Draw tokens at random with this seed. [default: always the likeliest token]")
@_placement_options
def generate(
    model: str, prompt: str, max_new_tokens: int, chat: bool | None, seed: int | None, **options: Any
) -> None:
    """Let a model, packed or not, write text; it appears as it is generated.

    \b
    Example:
      hf-pcdvq generate qwen-2bit --prompt "What is a codebook?" --max-new-tokens 64
    """
    from transformers import AutoTokenizer, TextStreamer, set_seed

    from .folders import check_source

    check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=options["trust_remote_code"])
    inputs = _prompt_tokens(tokenizer, prompt, chat)
    loaded = _load(model, **options)
    inputs = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    if seed is not None:
        set_seed(seed)
    started = time.monotonic()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sample = seed is not None
    ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=sample)
    seconds, count = time.monotonic() - started, ids.shape[1] - inputs["input_ids"].shape[1]
    _note(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} per second")


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, int64 `[1, tokens]`."""
    template = tokenizer.chat_template is not None
    if chat and not template:
        raise click.ClickException("the tokenizer has no chat template; use --no-chat")
    if template if chat is None else chat:
        chosen = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        encoded = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **chosen)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _note(text: str) -> None:
    click.echo(text, err=True)
