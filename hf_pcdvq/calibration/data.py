"""Calibration data: from whatever a user has to windows of tokens `[n, length]`.

Texts are tokenized whole, without special tokens, and laid end to end, documents separated by the end-of-text token if
the tokenizer has one; the result is cut into windows that do not overlap, of which a seed chooses some. Conversations
(`{"messages": [...]}` or lists of such messages) go through the chat template of the tokenizer first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..emulation import is_emulated, placed
from .settings import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of a streamed data set, read this many times the tokens that are needed, so that the seed has a choice.
_SURPLUS = 4
_SHUFFLE_BUFFER = 1000  # documents
_GENERATION_BATCH = 64  # sequences that a model writes at a time, at most


def split_windows(windows: Tensor, settings: Calibration) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and windows to measure on: token ids int64 `[n, L]` and `[m, L]`.

    Where there are fewer windows than asked for, all are used, at most a tenth of them for measuring, with a warning.
    """
    count, holdout = settings.samples + settings.holdout, settings.holdout
    if len(windows) < count:
        holdout = min(holdout, len(windows) // 10)
        logger.warning(
            "the calibration data holds %d windows of %d tokens, not %d: %d are calibrated on, %d measured on",
            *(len(windows), windows.shape[1], count, len(windows) - holdout, holdout),
        )
    return windows[: len(windows) - holdout], windows[len(windows) - holdout :]


def read_windows(data: Any, tokenizer: PreTrainedTokenizerBase | None, count: int, length: int, seed: int) -> Tensor:
    """Windows of tokens from calibration data, in a random order.

    Args:
        data: the path of a text or .jsonl file, the name of a data set on the Hub (`"name"` or `"name:configuration"`),
            a list of texts, of conversations (each a list of messages) or of token tensors, or a tensor int64 `[n, L]`.
            Tensors are taken as they are, in their order.
        tokenizer: not needed for tensors.
        count: windows wanted.
        length: tokens per window.
        seed: chooses which.

    Returns:
        int64 `[n, length]` on the CPU, n = `count` or fewer.

    Raises:
        ValueError: the data is shorter than one window, is of no known form, or needs a tokenizer and there is none.
        FileNotFoundError: `data` looks like a path, and there is no such file.
        ImportError: it names a data set on the Hub, and the package `datasets` is not installed.
    """
    ready = _token_windows(data)
    if ready is not None:
        return ready[:count]
    if tokenizer is None:
        raise ValueError("calibration on text needs a tokenizer")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    limit = None if _is_bounded(data) else _SURPLUS * count * length
    ids: list[int] = []
    for document in _documents(data, seed):
        ids += separator if ids else []
        ids += _tokenize(document, tokenizer)
        if limit is not None and len(ids) >= limit:
            break
    available = len(ids) // length
    if available == 0:
        raise ValueError(f"the calibration data has {len(ids)} tokens, fewer than the {length} of one window")
    windows = torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length)
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def _token_windows(data: Any) -> Tensor | None:
    """Data that is windows of tokens already, as one tensor; None if it is anything else."""
    if isinstance(data, Tensor):
        windows = data
    elif isinstance(data, Sequence) and data and all(isinstance(item, Tensor) for item in data):
        rows = [item.flatten() for item in data]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"calibration tensors must have one length, got {min(map(len, rows))} to {max(map(len, rows))} tokens; "
                "cut them to windows, or give texts"
            )
        windows = torch.stack(rows)
    else:
        return None
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"calibration tokens must be int64 [n, L], got {windows.dtype} {list(windows.shape)}")
    return windows.cpu()


def _is_bounded(data: Any) -> bool:
    """Whether the data is at hand, rather than a data set on the Hub that may be endless."""
    return not isinstance(data, (str, Path)) or Path(data).is_file()


def _documents(data: Any, seed: int) -> Iterator[str | list[dict[str, str]]]:
    """Texts and conversations, one after the other."""
    if not isinstance(data, (str, Path)):
        if not isinstance(data, Iterable):
            raise ValueError(f"calibration data must be a path, a name or a list, got {type(data).__name__}")
        yield from (_document(item, f"item {number}") for number, item in enumerate(data))
        return
    path = Path(data)
    if not path.is_file():
        yield from _hub_documents(str(data), seed)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(json.loads(line), f"{path}, line {number}")
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            yield stream.read()


def _document(item: Any, where: str) -> str | list[dict[str, str]]:
    """A text, or a list of chat messages, from one entry of a data set."""
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
    """A data set on the Hub, streamed and shuffled."""
    if name.startswith((".", "/", "~")) or name.endswith((".txt", ".jsonl")):
        raise FileNotFoundError(f"there is no calibration file {name}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file, and data sets on the Hub need the package datasets: "
            "pip install 'hf_pcdvq[calibration]'"
        ) from error
    path, _, configuration = name.partition(":")
    rows = load_dataset(path, configuration or None, split="train", streaming=True)
    for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
        yield _document(row, f"{name}, row {number}")


@torch.no_grad()
def sample_from_model(model: PreTrainedModel, count: int, length: int, seed: int, progress: bool = True) -> Tensor:
    """Text that the model writes by itself: data for calibration where there is none.

    Every sequence begins with the beginning-of-text token, if the model has one, and a random token of the vocabulary;
    the rest is drawn from the model's own predictions at temperature 1.

    Returns:
        int64 `[count, length]` on the CPU.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    start = model.generation_config.bos_token_id
    with placed(model, device, is_emulated(model.dtype, device)), torch.random.fork_rng():
        torch.manual_seed(seed)
        first = torch.randint(vocabulary, (count, 1))
        if start is not None:
            first = torch.cat([torch.full((count, 1), start), first], 1)
        parts = []
        batches = first.tensor_split(-(-count // _GENERATION_BATCH))
        for batch in tqdm(batches, desc="Writing calibration text", disable=not progress):
            prompt = batch.to(device)
            new = length - prompt.shape[1]
            written = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,  # nothing is padded; without one there is a warning
                min_new_tokens=new,
                max_new_tokens=new,
            )
            parts.append(written.cpu())
    return torch.cat(parts)
