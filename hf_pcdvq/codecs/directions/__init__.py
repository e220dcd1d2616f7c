"""The search for the direction of PCDVQ that is nearest to a vector.

A direction is a non-negative pattern with an even number of signs flipped. For a pattern `p` the best signs are those
of the vector `v`, unless an odd number of them are negative: then one sign is flipped where that costs least, at the
smallest `|v_j| p_j`. Patterns are therefore compared by `<|v|, p> - 2 [odd] min_j |v_j| p_j`.

On a CPU the search runs as loops compiled by Numba (`numba.py`) if it is installed, otherwise, and on a GPU, as PyTorch
operations (`reference.py`).
"""

from __future__ import annotations

from torch import Tensor

from ..compiled import use_numba
from . import reference

__all__ = ["nearest_direction"]


def nearest_direction(vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The signed direction with the largest cosine for every vector, over all patterns and even sign flips.

    `hf_pcdvq_kernels.set_backend("reference")` selects PyTorch everywhere.

    Args:
        vectors: float32 `[n, 8]`.
        directions: float32 `[P, 8]`, non-negative, with unit norm; P is a multiple of 32.

    Returns:
        Pattern index int32 `[n]`, sign bits 0-6 int32 `[n]`, and the projection onto the direction float32 `[n]`.
    """
    if use_numba(vectors.device, "PCDVQ"):
        from . import numba

        return numba.search(vectors, directions)
    return reference.search(vectors, directions)
