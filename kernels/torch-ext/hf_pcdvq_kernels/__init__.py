"""Decoding ops of PCDVQ and CCQ weights. Needs torch only; knows nothing of Transformers or of the plugin."""

from .backend import get_backend, set_backend
from .formats import CCQ_LAYOUTS, STREAM_BITS, STREAM_WINDOWS, CcqLayout, StreamLayout, stream_layout
from .functional import (
    ccq_dequantize,
    ccq_matmul,
    grouped_matmul,
    hadamard,
    pcdvq_dequantize,
    pcdvq_matmul,
    prepare,
    stream_dequantize,
    stream_matmul,
)

__all__ = [
    "CCQ_LAYOUTS",
    "STREAM_BITS",
    "STREAM_WINDOWS",
    "CcqLayout",
    "StreamLayout",
    "ccq_dequantize",
    "ccq_matmul",
    "get_backend",
    "grouped_matmul",
    "hadamard",
    "pcdvq_dequantize",
    "pcdvq_matmul",
    "prepare",
    "set_backend",
    "stream_dequantize",
    "stream_layout",
    "stream_matmul",
]
