"""Progress of long work on standard error: a bar on a terminal and in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import auto, std

_FIRST, _INTERVAL = 10, 60  # seconds to the first line, and between lines, where there is no terminal


class _Lines:
    """A stream that a bar draws itself on, and on which every state of it becomes a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n\x1b[A ")  # without what moves the cursor
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


def progress_of(items: Iterable | None = None, *, shown: bool = True, **options: Any) -> std.tqdm:
    """A `tqdm` over items, or over a `total`.

    Args:
        items: what is done one after the other; None where `update` says what is done.
        shown: whether it is shown.
        options: of `tqdm`, such as `desc`, `unit` and `total`.
    """
    in_notebook = auto.notebook_tqdm is not std.tqdm
    if not in_notebook and not sys.stderr.isatty():
        bar = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"
        options |= {"file": _Lines(sys.stderr), "bar_format": bar, "miniters": 1, "delay": _FIRST}
        options |= {"mininterval": _INTERVAL, "maxinterval": _INTERVAL}
    return auto.tqdm(items, disable=not shown, **options)
