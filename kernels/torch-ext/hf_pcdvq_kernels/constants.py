"""What decoding needs besides the packed tensors, and no file of a model holds: signs of rotations, and codebooks.

Codebooks are safetensors files in `codebooks/`. This package needs PyTorch only, so it hands out their bytes, and
`safetensors.torch.load` reads them.
"""

from __future__ import annotations

import hashlib
from importlib import resources

import torch
from torch import Tensor

CODEBOOK_TENSORS = ("patterns", "levels_norm", "levels_projection")
_MASK = 0xFFFFFFFF


def block_size(features: int, max_block: int) -> int:
    """Largest power of two that divides `features`, at most `max_block` (a power of two)."""
    return min(features & -features, max_block)


def _hash(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def signs(block: int, seed: int) -> Tensor:
    """The signs of one block of the rotation: float32 `[block]` of +-1, on the CPU."""
    start = 0x9E3779B9 * (seed + 1)
    values = [1.0 - 2.0 * (_hash((start + j) & _MASK) & 1) for j in range(block)]
    return torch.tensor(values, device="cpu", dtype=torch.float32)


def codebook_bytes(codebook: str) -> bytes:
    """The content of a codebook's safetensors file, by the codebook's id.

    Raises:
        ValueError: no codebook with that id is shipped.
    """
    folder = resources.files(__package__) / "codebooks"
    known = sorted(entry.name.removesuffix(".safetensors") for entry in folder.iterdir())
    if codebook not in known:  # rather than looking for such a file, which might be outside the folder
        raise ValueError(f"unknown codebook {codebook!r}; this version of hf_pcdvq_kernels ships {', '.join(known)}")
    return (folder / f"{codebook}.safetensors").read_bytes()


def codebook_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a codebook's contents, in hexadecimal: over the raw bytes of its tensors, in the order of `CODEBOOK_TENSORS`."""
    sha = hashlib.sha256()
    for name in CODEBOOK_TENSORS:
        sha.update(tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()
