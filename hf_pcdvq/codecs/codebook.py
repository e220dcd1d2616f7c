"""The codebooks of PCDVQ, shipped as data with the kernels.

They were trained once (`tools/train_codebooks.py`) and are never retrained on a user's machine: retrained floats
would decode to different weights. One safetensors file per codebook holds

    patterns           int8 [128 or 512, 8]   non-negative, each with norm about 127
    levels_norm        float32 [4]            Lloyd-Max levels of the magnitude |v|, divided by 127
    levels_projection  float32 [4]            Lloyd-Max levels of the projection <v, d>, divided by 127

The SHA-256 is computed over the raw little-endian bytes of the three tensors in this order. A packed model records
the codebook's id and hash, and is rejected if they do not match the installed data.
"""

from __future__ import annotations

from functools import cache

import torch
from hf_pcdvq_kernels.constants import codebook_bytes, codebook_digest
from safetensors.torch import load
from torch import Tensor


@cache
def load_codebook(codebook: str) -> dict[str, Tensor]:
    """The tensors of a shipped codebook, on the CPU. The result is shared: do not modify it.

    Raises:
        ValueError: no codebook with that id is shipped.
    """
    with torch.device("cpu"):
        return load(codebook_bytes(codebook))


@cache
def codebook_hash(codebook: str) -> str:
    """SHA-256 of a shipped codebook."""
    return codebook_digest(load_codebook(codebook))
