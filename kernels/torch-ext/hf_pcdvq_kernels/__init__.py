"""Ops on packed weights: decoding and matrix products. Depends on torch only, not on Transformers or the plugin."""

from .backend import get_backend, set_backend
from .formats import FAMILIES, FORMATS, family_of
from .functional import dequantize, grouped_matmul, hadamard, matmul, prepare

__all__ = [
    "FAMILIES",
    "FORMATS",
    "dequantize",
    "family_of",
    "get_backend",
    "grouped_matmul",
    "hadamard",
    "matmul",
    "prepare",
    "set_backend",
]
