"""The rotation that both methods use: a randomized Hadamard transform over blocks of the input dimension.

Weights are rotated as `W Q^T`, activations as `Q x`, so that `W x` is unchanged and the entries of the rotated weight
are close to normally distributed. `Q` is block-diagonal, and every block is the same orthogonal matrix

    Q_block = H diag(s) / sqrt(block),      H in Sylvester's order,

with `block` the largest power of two that divides the number of inputs, at most the codec's `max_block`. Using the
same matrix for all blocks loses nothing (mixing happens only within a block) and keeps the transform stateless:
layers with the same input share the rotated input, and a tensor-parallel slice of the inputs, split at block
boundaries, is rotated like the whole.

The signs are part of the format. `s_j` is +1 if the lowest bit of `hash(j + 0x9E3779B9 * (seed + 1))` is 0, else -1,
in 32-bit unsigned arithmetic, with the finalizer `hash`:
`x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16`.
No random number generator is involved, so they are the same on every machine and version.
"""

from __future__ import annotations

import hf_pcdvq_kernels as ops
from hf_pcdvq_kernels.constants import block_size, signs
from torch import Tensor

__all__ = ["block_size", "rotate", "signs", "unrotate"]


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """`x Q^T` along the last dimension of `[..., K]`."""
    return ops.hadamard(x, signs)


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """`x Q` along the last dimension: undoes `rotate`."""
    return ops.hadamard(x, signs, inverse=True)
