"""When the searches of encoders run as CPU loops that Numba compiles, and on how many threads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hf_pcdvq_kernels.backend import get_backend


def use_numba(device: torch.device, codes: str) -> bool:
    """Whether a search on this device runs compiled; warns if it could, were Numba installed.

    Args:
        device: of the tensors.
        codes: what the search encodes, for the warning.
    """
    if device.type != "cpu" or get_backend() == "reference":
        return False
    try:
        import numba  # noqa: F401
    except ImportError as reason:
        warnings.warn(
            f"encoding {codes} takes many times as long without Numba (pip install numba), "
            f"which cannot be imported: {reason}",
            stacklevel=2,
        )
        return False
    return True


@contextmanager
def torch_threads() -> Iterator[None]:
    """Let Numba use as many threads as PyTorch; both have the same number as before when it ends."""
    from numba import config, get_num_threads, set_num_threads

    most = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # Numba sets it at run time
    threads = torch.get_num_threads()  # Numba's OpenMP layer sets it to all cores when it starts its own
    before = get_num_threads()
    set_num_threads(min(threads, most))
    try:
        yield
    finally:
        set_num_threads(before)
        torch.set_num_threads(threads)
