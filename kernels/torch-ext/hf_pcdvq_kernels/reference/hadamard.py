"""Block-diagonal randomized Hadamard transform."""

from __future__ import annotations

import torch


def sylvester(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Hadamard matrix in Sylvester's order, entries +-1, shape `[order, order]`; `order` is a power of two."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def hadamard(x: torch.Tensor, signs: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """See `hf_pcdvq_kernels.hadamard`. Computes in float32 (float64 for float64 input), rounds once."""
    compute = torch.promote_types(x.dtype, torch.float32)
    block = signs.numel()
    rotation = sylvester(block, x.device, compute) * signs.to(compute) * block**-0.5
    blocks = x.to(compute).reshape(-1, block)
    # Allocated in the shape that is returned: a view of it could not be changed in place under autograd.
    rotated = torch.empty(x.shape, dtype=compute, device=x.device)
    torch.mm(blocks, rotation if inverse else rotation.T, out=rotated.view(-1, block))
    return rotated.to(x.dtype)
