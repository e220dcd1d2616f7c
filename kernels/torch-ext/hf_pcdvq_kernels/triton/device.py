"""What every kernel launch needs to know about the device and Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import tiles

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = isinstance(tiles.sum_kernel, InterpretedFunction)
# The compiler may not fuse multiplications and additions: code words must be rounded exactly as in the reference.
# Where a fused operation is wanted, the kernels use one explicitly.
# Loads are not pipelined through shared memory either: that would take more shared memory than is available.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
TRITON_HAS_PDL = TRITON >= (3, 5)  # 3.4 has the instructions, but cannot compile them


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may contain PTX."""
    return device.type == "cuda" and torch.version.hip is None


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs: programmatic dependent launch (Hopper)."""
    return has_ptx(device) and TRITON_HAS_PDL and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_option(pdl: bool) -> dict[str, bool]:
    """The option of such a launch, which versions of Triton without it do not know."""
    return {"launch_pdl": True} if pdl else {}


def current(device: torch.device) -> AbstractContextManager:
    """Makes a device current: Triton launches on the current device, not on that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
