"""Decoding ops of PCDVQ and CCQ weights. Needs torch only; knows nothing of Transformers or of the plugin."""

from ._ops import ccq_dequantize, ccq_matmul, hadamard, pcdvq_dequantize, pcdvq_matmul
from .formats import CCQ_LAYOUTS, CcqLayout

__all__ = [
    "CCQ_LAYOUTS",
    "CcqLayout",
    "ccq_dequantize",
    "ccq_matmul",
    "hadamard",
    "pcdvq_dequantize",
    "pcdvq_matmul",
]
