"""What every launch needs to know of the device and of Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from triton.runtime.interpreter import InterpretedFunction

from . import tiles

INTERPRETED = isinstance(tiles.sum_kernel, InterpretedFunction)
# No kernel lets the compiler fuse multiplications and additions: code words must be rounded as the reference rounds them.
# Where a fused operation is wanted, the kernels say so.
# Loads are not pipelined through shared memory either: it would take more of that than there is.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may contain PTX."""
    return device.type == "cuda" and torch.version.hip is None


def current(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one: Triton launches there, whichever the tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
