"""Tail-biting Viterbi search over windows: finds rings of the stream layout with nearly the least squared error.

From one weight to the next, a window of `L` bits advances by the `k` new bits of the next weight. Adjacent windows
share `L - k` bits, the trellis state between them; a window `w` leads from state `w >> k` to state
`w mod 2^(L - k')`, where `k'` is the number of new bits of the weight after it. For every state the search keeps the
least error of all paths to it.

In a ring, the path has to end in the state in which it began. That state is found first, by an unconstrained search
over a stretch of `OVERLAP` weights on either side of the ring's boundary; given that state, the search over the whole
ring is exact. (Trying all states would take one search for each.)

`search` chooses the implementation: `triton.py` on a GPU; on a CPU, loops compiled by Numba (`numba.py`) if it is
installed, otherwise PyTorch operations (`reference.py`), which are the reference for both.
"""

from __future__ import annotations

from hf_pcdvq_kernels.backend import use_triton
from hf_pcdvq_kernels.formats.stream import StreamLayout
from torch import Tensor

from ..compiled import use_numba
from . import reference
from .reference import OVERLAP

__all__ = ["OVERLAP", "search"]


def search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout) -> Tensor:
    """Windows with nearly the least `sum of cost * (value of the window - target)^2` over every ring.

    `hf_pcdvq_kernels.set_backend` selects the implementation, as for the ops.

    Args:
        targets: float32 `[C, N]`, `N` a multiple of the layout's period; rings of 256 run along the second dimension;
            the last one may be shorter.
        cost: float32 `[N]`, non-negative.
        values: float32 `[2^L]`, the values of all windows.

    Returns:
        int32 `[C, N]`; in every ring each window continues the previous one, and the first one continues the last.

    Raises:
        RuntimeError: the backend is `"triton"`, and Triton does not support this device.
    """
    if use_triton(targets.device, targets.dtype):
        from . import triton

        return triton.search(targets, cost, values, layout, OVERLAP)
    if use_numba(targets.device, "the stream layout"):
        from . import numba

        return numba.search(targets, cost, values, layout, OVERLAP)
    return reference.search(targets, cost, values, layout)
