"""Memory that was freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give the system the memory that was freed.

    glibc keeps what is free between pieces that are in use: more and more, where large tensors come and go. Other C libraries
    are left alone.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
