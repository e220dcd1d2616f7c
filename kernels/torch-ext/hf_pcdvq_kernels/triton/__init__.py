"""Triton kernels. Imported only where they run, so that the ops import without Triton."""
