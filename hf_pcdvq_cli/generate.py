"""`hf-pcdvq generate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .common import Command, load_model, note, placement_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@click.command(cls=Command)
@click.argument("model")
@click.option("--prompt", required=True, help="Text for the model to answer or continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Put the prompt into the model's chat template, or have the model continue the plain text. "
    "[default: chat if the tokenizer has a template]",
)
@click.option("--seed", type=int, help="Sample tokens with this seed. [default: greedy decoding]")
@placement_options
def generate(
    model: str, prompt: str, max_new_tokens: int, chat: bool | None, seed: int | None, **options: Any
) -> None:
    """Generate text with a model, packed or not, and print it while it is generated.

    \b
    Example:
      hf-pcdvq generate qwen-2bit --prompt "What is a codebook?" --max-new-tokens 64
    """
    from transformers import AutoTokenizer, set_seed

    from hf_pcdvq.files.folders import check_source

    check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=options["trust_remote_code"])
    inputs = _prompt_tokens(tokenizer, prompt, chat)
    loaded = load_model(model, **options)
    inputs = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    if seed is not None:
        set_seed(seed)
    started = time.monotonic()
    streamer = _streamer(tokenizer)
    sample = seed is not None
    ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=sample)
    seconds, count = time.monotonic() - started, ids.shape[1] - inputs["input_ids"].shape[1]
    note(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} per second")


def _streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Prints what is generated, without the control characters by which a model could steer the terminal."""
    from transformers import TextStreamer

    from hf_pcdvq.files.text import without_controls

    class PlainStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(without_controls(text), stream_end)

    return PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


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
