"""The documents of a calibration dataset: texts and conversations, from a file, from memory or from the Hub.

No more is read than asked for: a dataset that is longer is sampled. Its documents then come in random order, and long
texts in pieces, cut at line ends where there are some, so that the windows come from everywhere in it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SHUFFLE_BUFFER = 1000  # documents
_BOM = "\ufeff"
_FIELDS = ("messages", "conversation", "text", "content")


@dataclass(frozen=True)
class Conversation:
    """Chat messages, each a dictionary with a `"role"`, and the tools that they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class Entry(NamedTuple):
    """One document, or a piece of one, and a function that says where it stands, for error messages."""

    document: str | Conversation
    place: Callable[[], str]


class Sample(NamedTuple):
    """How much of a dataset is read.

    Attributes:
        characters: a dataset with more of them is sampled.
        piece: length of the pieces that long texts are then cut into, in characters.
        seed: chooses them.
    """

    characters: int
    piece: int
    seed: int

    def order(self, count: int) -> list[int]:
        """The numbers 0 .. count - 1 in random order."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()


class Documents(NamedTuple):
    """The documents of a dataset, one by one.

    Attributes:
        entries: in the order of the dataset if that is `whole`, else in random order, for whoever reads them to stop.
        whole: there are not many, and all are to be read.
    """

    entries: Iterator[Entry]
    whole: bool


def read_documents(dataset: Any, sample: Sample) -> Documents:
    """The documents of a dataset.

    Args:
        dataset: the path of a text, .json or .jsonl file, the name of a dataset on the Hub, or texts and conversations.
        sample: how much to read.

    Raises (reading the entries included):
        ValueError: the dataset or one of its documents has no known form; the message says where.
        FileNotFoundError: `dataset` looks like a path, and there is no such file.
        ImportError: it names a dataset on the Hub, and the package `datasets` is not installed.
    """
    if not isinstance(dataset, (str, Path)):
        return _items(dataset, sample, "item")
    path = Path(dataset)
    if not path.is_file():
        return Documents(_hub_rows(str(dataset), sample.seed), whole=False)
    if path.suffix == ".json":
        return _items(_json_list(path), sample, f"{path}, item")
    whole = path.stat().st_size <= sample.characters
    read = _json_lines if path.suffix == ".jsonl" else _text_file
    return Documents(read(path, sample, whole), whole)


# ----------------------------------------------------------------------------------------------------------- in memory


def _items(items: Any, sample: Sample, what: str) -> Documents:
    """The documents of a list, or of anything else that can be iterated over."""
    if not isinstance(items, Iterable):
        raise ValueError(f"the dataset must be a path, a name or a list, got {type(items).__name__}")
    in_order = (_entry(item, what, number) for number, item in enumerate(items))
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        return Documents(in_order, whole=False)
    if any(size > sample.characters for size in accumulate(len(_text_of(item)) for item in items)):
        return Documents(_sampled_items(items, sample, what), whole=False)
    return Documents(in_order, whole=True)


def _sampled_items(items: Any, sample: Sample, what: str) -> Iterator[Entry]:
    """Items in random order; of a text that is longer than an equal share for all of them, as many pieces as make one."""
    share = max(sample.piece, sample.characters // len(items))
    for number in sample.order(len(items)):
        entry = _entry(items[number], what, number)
        text = entry.document
        if not isinstance(text, str) or len(text) <= share:
            yield entry
            continue
        for start, end in _pieces(text, "\n", sample)[: -(-share // sample.piece)]:
            yield Entry(text[start:end], entry.place)


def _entry(item: Any, what: str, number: int) -> Entry:
    def place() -> str:
        return f"{what} {number}"

    return Entry(_document(item, place), place)


def _text_of(item: Any) -> str:
    """Text about as long as that of an entry, whatever its form."""
    return item if isinstance(item, str) else str(item)


def _document(item: Any, place: Callable[[], str]) -> str | Conversation:
    """A text or a conversation from one entry of a dataset."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        for key in _FIELDS:
            if isinstance(item.get(key), (str, list)):
                found = _document(item[key], place)
                return Conversation(found.messages, item.get("tools")) if isinstance(found, Conversation) else found
        raise ValueError(f"{place()}: expected a field 'text' or 'messages', found {', '.join(map(repr, item))}")
    if isinstance(item, list) and item and all(isinstance(turn, dict) and "role" in turn for turn in item):
        return Conversation(item)
    raise ValueError(f"{place()}: expected a text or a list of chat messages, got {type(item).__name__}")


# --------------------------------------------------------------------------------------------------------------- files


def read_text(path: Path) -> str:
    """The text of a file as it is, line ends included.

    Raises:
        ValueError: it is not UTF-8.
    """
    return _decoded(path.read_bytes(), path, 0)


def _json_list(path: Path) -> list[Any]:
    """The items of a .json file, which has to be read whole."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error}; a file with one document per line is called .jsonl"
        ) from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of texts or conversations, got {type(content).__name__}")
    return content


def _text_file(path: Path, sample: Sample, whole: bool) -> Iterator[Entry]:
    """A text, as a whole or in pieces."""

    def place() -> str:
        return str(path)

    if whole:
        yield Entry(read_text(path), place)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start, end in _pieces(content, b"\n", sample):
            yield Entry(_decoded(content[start:end], path, start), place)


def _json_lines(path: Path, sample: Sample, whole: bool) -> Iterator[Entry]:
    """The documents in the lines of a file, in its own order or in that of its pieces."""
    size = path.stat().st_size
    if size == 0:  # which cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pieces = [(0, size)] if whole else _pieces(content, b"\n", sample, whole_lines=True)
        for start, end in pieces:
            position = start
            while position < end:
                newline = content.find(b"\n", position)
                stop = size if newline < 0 else newline
                line, begin, position = content[position:stop], position, stop + 1
                if line.strip():
                    yield _line(line, path, content, begin)


def _line(line: bytes, path: Path, content: mmap.mmap, begin: int) -> Entry:
    def place() -> str:
        return f"{path}, line {_line_number(content, begin)}"

    try:
        item = json.loads(_decoded(line, path, begin))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place()}: not JSON, or cut off: {error}") from error
    return Entry(_document(item, place), place)


def _line_number(content: mmap.mmap, position: int) -> int:
    """The number of the line at a position, from 1. It takes time, so it is asked for in errors only."""
    step = 1 << 20
    return 1 + sum(content[start : min(start + step, position)].count(b"\n") for start in range(0, position, step))


def _decoded(content: bytes, path: Path, offset: int) -> str:
    """The text of a part of a file, without the byte-order mark at its beginning."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at position {offset + error.start}; convert it, for "
            "instance with iconv"
        ) from error
    return text if offset else text.removeprefix(_BOM)


def _pieces(content: Any, newline: Any, sample: Sample, whole_lines: bool = False) -> list[tuple[int, int]]:
    """The pieces of a text as pairs of positions, in random order.

    They begin where a line does. Unless `whole_lines` is set, lines longer than a piece are cut.
    """

    def line_start(position: int) -> int:
        if position in (0, len(content)):
            return position
        found = content.find(newline, position - 1, len(content) if whole_lines else position + sample.piece)
        if found >= 0:
            return found + 1
        return len(content) if whole_lines else _character_start(content, position)

    starts = [line_start(position) for position in range(0, len(content), sample.piece)]
    pieces = [pair for pair in zip(starts, [*starts[1:], len(content)]) if pair[0] < pair[1]]
    return [pieces[number] for number in sample.order(len(pieces))]


def _character_start(content: Any, position: int) -> int:
    """The first position from `position` on that is not inside a character of UTF-8."""
    while not isinstance(content, str) and position < len(content) and content[position] & 0xC0 == 0x80:
        position += 1
    return position


# ------------------------------------------------------------------------------------------------------------- the Hub


def _hub_rows(name: str, seed: int) -> Iterator[Entry]:
    """A dataset on the Hub, streamed and shuffled."""
    if name.startswith((".", "/", "~")) or name.endswith((".txt", ".json", ".jsonl")):
        raise FileNotFoundError(f"there is no calibration file {name}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and datasets on the Hub need the package datasets: pip install datasets"
        ) from error
    path, _, configuration = name.partition(":")
    rows = load_dataset(path, configuration or None, split="train", streaming=True)
    for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
        yield _entry(row, f"{name}, row", number)
