"""Calibration data: windows of tokens `[n, length]` from a user's dataset.

Texts are tokenized whole, without special tokens, and concatenated, separated by the end-of-text token if the
tokenizer has one; the result is split into windows that do not overlap, from which a seed selects some. The
tokenizer's chat template is applied to conversations (`{"messages": [...]}` or lists of such messages) first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .settings import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of a streamed dataset, read this many times the tokens that are needed, so that the seed has some to select from.
_SURPLUS = 4
_SHUFFLE_BUFFER = 1000  # documents


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


def read_windows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, count: int, length: int, seed: int
) -> Tensor:
    """Windows of tokens from a dataset, in random order.

    Args:
        dataset: the path of a text or .jsonl file, the name of a dataset on the Hub (`"name"` or
            `"name:configuration"`), a list of texts, of conversations (each a list of messages) or of token tensors,
            or a tensor int64 `[n, L]`. Tensors are used unchanged and in order, whatever their length.
        tokenizer: may be None for tensors.
        count: maximum number of windows.
        length: tokens per window.
        seed: selects the windows.

    Returns:
        int64 `[n, length]` on the CPU, n = `count` or fewer.

    Raises:
        ValueError: the dataset is shorter than one window, has no known form, or needs a tokenizer and there is none.
        FileNotFoundError: `dataset` looks like a path, and there is no such file.
        ImportError: it names a dataset on the Hub, and the package `datasets` is not installed.
    """
    ready = _token_windows(dataset)
    if ready is not None:
        return ready[:count]
    if tokenizer is None:
        raise ValueError("calibration on text needs a tokenizer")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    limit = None if _is_local(dataset) else _SURPLUS * count * length
    ids: list[int] = []
    for document in _documents(dataset, seed):
        ids += separator if ids else []
        ids += _tokenize(document, tokenizer)
        if limit is not None and len(ids) >= limit:
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


def _is_local(dataset: Any) -> bool:
    """Whether the dataset is a file or in memory, rather than streamed from the Hub, which may be endless."""
    return not isinstance(dataset, (str, Path)) or Path(dataset).is_file()


def _documents(dataset: Any, seed: int) -> Iterator[str | list[dict[str, str]]]:
    """Texts and conversations, one by one."""
    if not isinstance(dataset, (str, Path)):
        if not isinstance(dataset, Iterable):
            raise ValueError(f"the dataset must be a path, a name or a list, got {type(dataset).__name__}")
        yield from (_document(item, f"item {number}") for number, item in enumerate(dataset))
        return
    path = Path(dataset)
    if not path.is_file():
        yield from _hub_documents(str(dataset), seed)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(json.loads(line), f"{path}, line {number}")
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            yield stream.read()


def _document(item: Any, where: str) -> str | list[dict[str, str]]:
    """A text, or a list of chat messages, from one entry of a dataset."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        for key in ("messages", "conversation", "text", "content"):
            if isinstance(item.get(key), (str, list)):
                return _document(item[key], where)
        raise ValueError(f"{where}: expected a field 'text' or 'messages', found {', '.join(map(repr, item))}")
    if isinstance(item, list) and item and all(isinstance(turn, dict) and "role" in turn for turn in item):
        return item
    raise ValueError(f"{where}: expected a text or a list of chat messages, got {type(item).__name__}")


def _tokenize(document: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(document, str):
        if tokenizer.chat_template is None:
            raise ValueError("the calibration data holds conversations, and the tokenizer has no chat template")
        document = tokenizer.apply_chat_template(document, tokenize=False)
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def _hub_documents(name: str, seed: int) -> Iterator[str | list[dict[str, str]]]:
    """A dataset on the Hub, streamed and shuffled."""
    if name.startswith((".", "/", "~")) or name.endswith((".txt", ".jsonl")):
        raise FileNotFoundError(f"there is no calibration file {name}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and datasets on the Hub need the package datasets: "
            "pip install 'hf_pcdvq[calibration]'"
        ) from error
    path, _, configuration = name.partition(":")
    rows = load_dataset(path, configuration or None, split="train", streaming=True)
    for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
        yield _document(row, f"{name}, row {number}")
