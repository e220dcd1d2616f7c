"""Decoding ops of PCDVQ and CCQ weights. Needs torch only; knows nothing of Transformers or of the plugin."""

from ._ops import (
    ccq_dequantize,
    ccq_matmul,
    hadamard,
    pcdvq_dequantize,
    pcdvq_matmul,
    stream_dequantize,
    stream_matmul,
)
from .formats import CCQ_LAYOUTS, STREAM_BITS, STREAM_WINDOWS, CcqLayout, StreamLayout, stream_layout

__all__ = [
    "CCQ_LAYOUTS",
    "STREAM_BITS",
    "STREAM_WINDOWS",
    "CcqLayout",
    "StreamLayout",
    "ccq_dequantize",
    "ccq_matmul",
    "hadamard",
    "pcdvq_dequantize",
    "pcdvq_matmul",
    "stream_dequantize",
    "stream_layout",
    "stream_matmul",
]
