"""Temporary folders that do not stay behind: not after SIGTERM either, and after a kill until the next one is made."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = ".hf_pcdvq-"
_LOCK = "lock"
_YOUNG = 60.0  # seconds in which a folder that is not locked yet may belong to a process that is about to lock it


@contextmanager
def scratch_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """Make an empty folder that is deleted when the body ends, by an error or SIGTERM too.

    What a killed process left in the same place is deleted first. A living one is recognized by the lock that it holds,
    because process ids repeat in containers.

    Args:
        parent: where to make it; None takes the system's temporary folder.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    _delete_abandoned(parent)
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_exit())
        outer = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)))
        stack.enter_context(FileLock(outer / _LOCK))
        folder = outer / "files"
        folder.mkdir()
        yield folder


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM end the body like `sys.exit`, so that it cleans up, unless the program handles SIGTERM itself.

    Python runs handlers in the main thread only; in another one, nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning
    raise SystemExit(128 + number)


def _delete_abandoned(parent: Path) -> None:
    """Delete scratch folders of this user whose process has ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another user's is not ours to touch, nor is what it may link to.
        with suppress(OSError, Timeout):
            status = folder.lstat()
            if hasattr(os, "getuid") and status.st_uid != os.getuid():
                continue
            if folder.is_symlink() or time.time() - status.st_mtime < _YOUNG or not (folder / _LOCK).is_file():
                continue
            with FileLock(folder / _LOCK, timeout=0):
                shutil.rmtree(folder)
