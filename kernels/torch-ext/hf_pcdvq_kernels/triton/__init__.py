"""Triton kernels. Imported only when they run, so that the ops can be imported without Triton."""
