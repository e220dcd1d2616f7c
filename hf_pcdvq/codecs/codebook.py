"""The codebooks of PCDVQ, shipped as data.

They were trained once (`tools/train_codebooks.py`) and are never retrained on a user's machine: retrained floats
would decode to different weights. One safetensors file per codebook holds

    patterns           int8 [128 or 512, 8]   non-negative, each with norm about 127
    levels_norm        float32 [4]            Lloyd-Max levels of the magnitude |v|, divided by 127
    levels_projection  float32 [4]            Lloyd-Max levels of the projection <v, d>, divided by 127

The SHA-256 is computed over the raw little-endian bytes of the three tensors in this order. A packed model records
the codebook's id and hash, and is rejected if they do not match the installed data.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor

TENSORS = ("patterns", "levels_norm", "levels_projection")


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a codebook's contents, in hexadecimal."""
    sha = hashlib.sha256()
    for name in TENSORS:
        sha.update(tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


@cache
def load_codebook(codebook: str) -> dict[str, Tensor]:
    """The tensors of a shipped codebook, on the CPU. The result is shared: do not modify it.

    Raises:
        ValueError: no codebook with that id is shipped.
    """
    folder = resources.files(__package__) / "data"
    known = sorted(entry.name.removesuffix(".safetensors") for entry in folder.iterdir())
    if codebook not in known:  # rather than looking for such a file, which might be outside the folder
        raise ValueError(f"unknown codebook {codebook!r}; this version of hf_pcdvq ships {', '.join(known)}")
    with torch.device("cpu"):
        return load((folder / f"{codebook}.safetensors").read_bytes())


@cache
def codebook_hash(codebook: str) -> str:
    """SHA-256 of a shipped codebook."""
    return digest(load_codebook(codebook))
