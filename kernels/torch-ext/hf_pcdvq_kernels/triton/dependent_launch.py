"""Programmatic dependent launch: the launch of a kernel and the end of the one before it overlap (NVIDIA GPUs since Hopper)."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import TRITON_HAS_PDL

# Versions of Triton without these instructions do not even compile what would not use them.
if TRITON_HAS_PDL:

    @triton.jit
    def let_next_launch(PDL: tl.constexpr):
        """Let the kernel after this one, which waits, be launched."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def wait_for_inputs(PDL: tl.constexpr):
        """Wait until the kernels before this one have ended; then let the one after it be launched, which waits too.

        No memory may be accessed before this.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
        let_next_launch(PDL)

else:

    @triton.jit
    def let_next_launch(PDL: tl.constexpr):
        pass

    @triton.jit
    def wait_for_inputs(PDL: tl.constexpr):
        pass
