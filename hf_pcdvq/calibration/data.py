"""Calibration data: windows of tokens `[n, length]` from a user's dataset.

Texts are tokenized without special tokens and concatenated, separated by the end-of-text token if the tokenizer has
one; the result is split into windows that do not overlap, from which a seed selects some. The tokenizer's chat template
is applied to conversations (`{"messages": [...]}` or lists of such messages) first. No more is tokenized than a few times
what is needed (`texts.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .settings import Calibration
from .texts import Conversation, Entry, Sample, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of a long dataset, read this many times the tokens that are needed, so that the seed has some to select from.
_SURPLUS = 4
_BATCH_TOKENS = 1 << 13
_CHARACTERS = 4  # per token, about
_WHOLE = 4 << 20  # characters that are read whole anyway: it takes seconds
_PIECE, _PIECE_WINDOWS = 1 << 11, 4  # smallest piece that is read of a long text, in characters and in windows


def split_windows(windows: Tensor, settings: Calibration) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on and windows to measure on: token ids int64 `[n, L]` and `[m, L]`.

    If there are fewer windows than the settings ask for, all are used, at most a tenth of them for measuring, and a
    warning says so.
    """
    count, holdout = settings.samples + settings.holdout, settings.holdout
    if len(windows) < count:
        holdout = min(holdout, len(windows) // 10)
        logger.warning(
            "the calibration data holds %d windows of %d tokens, not %d: %d are calibrated on, %d measured on",
            *(len(windows), windows.shape[1], count, len(windows) - holdout, holdout),
        )
    return windows[: len(windows) - holdout], windows[len(windows) - holdout :]


def window_batches(windows: Tensor, device: torch.device, tokens: int | None = None) -> tuple[Tensor, ...]:
    """The windows that go through a decoder block at once, int64 `[b, L]` each.

    Which they are decides the order in which Hessians are summed, and so the last bits of a result.

    Args:
        windows: int64 `[n, L]`.
        device: where blocks are computed.
        tokens: in a batch, at most, but never less than one window. None takes 8192 on an accelerator, which one window
            would leave idle, and one window on a CPU, whose cores it keeps busy.
    """
    if tokens is None:
        tokens = 0 if device.type == "cpu" else _BATCH_TOKENS
    return windows.split(max(1, tokens // windows.shape[1]))


def read_windows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, count: int, length: int, seed: int
) -> Tensor:
    """Windows of tokens from a dataset, in random order.

    Args:
        dataset: the path of a text, .json (a list) or .jsonl file, the name of a dataset on the Hub (`"name"` or
            `"name:configuration"`), a list of texts, of conversations (each a list of messages) or of token tensors,
            or a tensor int64 `[n, L]`. Tensors are used unchanged and in order, whatever their length.
        tokenizer: may be None for tensors.
        count: maximum number of windows.
        length: tokens per window.
        seed: selects the windows.

    Returns:
        int64 `[n, length]` on the CPU, n = `count` or fewer.

    Raises:
        ValueError: the dataset is shorter than one window, has no known form, or needs a tokenizer and there is none;
            or the chat template does not accept a conversation.
        FileNotFoundError: `dataset` looks like a path, and there is no such file.
        ImportError: it names a dataset on the Hub, and the package `datasets` is not installed.
    """
    ready = _token_windows(dataset)
    if ready is not None:
        return ready[:count]
    if tokenizer is None:
        raise ValueError("calibration on text needs a tokenizer")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    limit = _SURPLUS * count * length
    sample = Sample(max(_WHOLE, _CHARACTERS * limit), max(_PIECE, _PIECE_WINDOWS * _CHARACTERS * length), seed)
    entries, whole = read_documents(dataset, sample)
    ids: list[int] = []
    for entry in entries:
        ids += separator if ids else []
        ids += _tokenize(entry, tokenizer)
        if len(ids) >= limit and not whole:
            break
    available = len(ids) // length
    if available == 0:
        raise ValueError(f"the calibration data has {len(ids)} tokens, fewer than the {length} of one window")
    windows = torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length)
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def _token_windows(dataset: Any) -> Tensor | None:
    """A dataset that consists of token tensors, as one tensor; None if it is anything else."""
    if isinstance(dataset, Tensor):
        windows = dataset
    elif isinstance(dataset, Sequence) and dataset and all(isinstance(item, Tensor) for item in dataset):
        rows = [item.flatten() for item in dataset]
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        if shortest != longest:
            raise ValueError(
                f"calibration tensors must have one length, got {shortest} to {longest} tokens; "
                "cut them into windows, or pass texts"
            )
        windows = torch.stack(rows)
    else:
        return None
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"calibration tokens must be int64 [n, L], got {windows.dtype} {list(windows.shape)}")
    return windows.cpu()


def _tokenize(entry: Entry, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = entry.document
    if isinstance(text, Conversation):
        text = _rendered(text, entry.place, tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _rendered(conversation: Conversation, place: Callable[[], str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError("the calibration data holds conversations, and the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
    except Exception as error:  # a template is a program: it may refuse by any error, or fail
        calls = any("tool_calls" in turn for turn in conversation.messages)
        raise ValueError(
            f"{place()}: the tokenizer's chat template does not accept the conversation"
            f"{', which calls tools' if calls else ''} ({type(error).__name__}: {error}); leave it out, or pass texts"
        ) from error
