"""llama.cpp's quantizers, from the wheel of its fork ik_llama.cpp, with an importance matrix. Option: type.

Its types need rows of a multiple of 256 weights, so rows are joined until their length is one.
"""

import ctypes
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from adapter import each_weight


class InitParameters(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


# Loaded as a plain library: only the quantizers in it are called.
ggml = ctypes.CDLL(str(Path(find_spec("ik_llama_cpp").origin).parent / "lib" / "libggml.so"))
ggml.ggml_type_name.restype = ctypes.c_char_p
ggml.ggml_row_size.restype = ctypes.c_size_t
ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
ggml.ggml_init.restype = ctypes.c_void_p
ggml.ggml_init.argtypes = [InitParameters]
# Fills the table that converts float16 scales; without it weights decode to zeros. The context itself is not needed.
ggml.ggml_init(InitParameters(1 << 20, None, True))
BLOCK = 256
TYPES = 160  # type numbers to search; the library has more


def quantize(weight, inputs, type):
    number = next(number for number in range(TYPES) if ggml.ggml_type_name(number) == type.encode())
    length = math.lcm(weight.shape[1], BLOCK)
    rows = weight.contiguous().view(-1, length)
    importance = inputs.repeat(length // weight.shape[1]).contiguous()
    size = ggml.ggml_row_size(number, length)
    packed = torch.zeros(len(rows), size, dtype=torch.uint8)
    pointers = rows.data_ptr(), packed.data_ptr()
    written = ggml.ggml_quantize_chunk(number, *pointers, 0, len(rows), length, importance.data_ptr())
    if written != packed.nbytes:
        raise ValueError(f"{type}: wrote {written} bytes, expected {packed.nbytes}")
    decode = getattr(ggml, f"dequantize_row_{type}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decoded = torch.empty_like(rows)
    for source, target in zip(packed, decoded):
        decode(source.data_ptr(), target.data_ptr(), length)
    return decoded.view_as(weight), packed.nbytes


each_weight("ik-llama-cpp-python", quantize)
