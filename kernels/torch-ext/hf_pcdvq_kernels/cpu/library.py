"""Loads the shared library of the CPU backend and declares its functions, as in `csrc/interface.h`."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..formats import PackedWeight

INTERFACE_VERSION = 1
PATH = Path(__file__).parent / "libhfp.so"

# In the order of `HfpFormat` and `HfpDtype`.
FORMAT_NAMES = (
    "pcdvq-2.0",
    "pcdvq-2.25",
    "ccq-2.75",
    "ccq-2.5",
    "ccq-2.0625",
    "stream-2.0",
    "stream-2.25",
    "stream-2.5",
    "stream-3.0",
    "stream-4.0",
    "int8",
)
FORMAT_CODES = {name: code for code, name in enumerate(FORMAT_NAMES)}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_STACKED = ("weight", "magnitude", "local_scale")


class Weight(Structure):
    """`HfpWeight`: its tensors have the names of the ops' arguments."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "magnitude", "local_scale", "scale")),
        *((name, c_void_p) for name in ("code_scale", "code_zero", "patterns", "levels")),
        *((name, c_int64) for name in ("window_bits", "format", "rows", "columns")),
        *((f"{name}_stride", c_int64) for name in _STACKED),
    ]


_TENSORS = [field[0] for field in Weight._fields_ if field[1] is c_void_p]


def describe(weight: PackedWeight, stack: dict[str, torch.Tensor | None] | None = None) -> Weight:
    """The weight for the library. Holds addresses only: the tensors must outlive it.

    Args:
        weight: a validated weight; for a stack, one of its weights.
        stack: the stacked tensors by argument name, for a stack.
    """
    described = Weight(format=FORMAT_CODES[weight.name], rows=weight.rows, columns=weight.columns)
    described.window_bits = getattr(weight, "window_bits", 0)
    for name in _TENSORS:
        tensor = getattr(weight, name, None)
        if stack is not None and stack.get(name) is not None:
            tensor = stack[name]
            if name in _STACKED:
                setattr(described, f"{name}_stride", tensor.stride(0) * tensor.element_size())
        if tensor is not None:
            setattr(described, name, tensor.data_ptr())
    return described


class Library:
    """The functions of the library.

    Attributes:
        prepare, matmul, linear, grouped_linear, dequantize, hadamard: foreign functions, which release the GIL. All but
            `matmul` and `dequantize` return 0 if memory is lacking, see `csrc/interface.h`.
        used: the name of the instruction set in use.
    """

    def __init__(self, path: Path):
        """Load the library. Raises OSError if it cannot be loaded, RuntimeError if it is of another version."""
        library = ctypes.CDLL(str(path))
        version = library.hfp_interface_version()
        if version != INTERFACE_VERSION:
            raise RuntimeError(
                f"{path} has interface version {version}, and this package needs {INTERFACE_VERSION}; install it "
                "again: pip install --force-reinstall --no-deps ./kernels"
            )
        self._library = library
        weight, pointer, size, number = POINTER(Weight), c_void_p, c_int64, c_int32
        self.prepare = self._function(
            "prepare", number, [number, pointer, number, size, size, pointer, size, pointer, number]
        )
        self.matmul = self._function("matmul", None, [weight, pointer, size, pointer, number, number])
        self.linear = self._function(
            "linear", number, [weight, pointer, number, size, pointer, size, pointer, number]
        )
        self.grouped_linear = self._function(
            "grouped_linear",
            number,
            [weight, pointer, size, pointer, number, size, pointer, size, pointer, number],
        )
        self.dequantize = self._function("dequantize", None, [weight, size, size, pointer, number, number])
        self.hadamard = self._function(
            "hadamard", number, [pointer, number, size, size, pointer, size, number, pointer, number]
        )
        self.prepared_words = self._function("prepared_words", size, [size, size])
        self._instructions = self._function("instructions", c_char_p, [])
        self._set_instructions = self._function("set_instructions", number, [c_char_p])
        self.used = self.instructions[0]
        self._share_threads()

    def _function(self, name: str, result: Any, arguments: list[Any]) -> Callable[..., Any]:
        function = getattr(self._library, f"hfp_{name}")
        function.restype, function.argtypes = result, arguments
        return function

    def _share_threads(self) -> None:
        """Have the library run in the threads of the OpenMP runtime that PyTorch has loaded.

        A runtime of its own would be a second team of threads, spinning against PyTorch's. Without a runtime that offers
        GOMP_parallel, which GCC's, LLVM's and Intel's do on Linux, the library uses the calling thread only.
        """
        fork = _openmp_fork()
        if fork is not None:
            self._library.hfp_set_fork.argtypes = [c_void_p]
            self._library.hfp_set_fork(fork)
        else:
            warnings.warn(
                "hf_pcdvq multiplies on one thread: PyTorch has no OpenMP runtime with GOMP_parallel", stacklevel=3
            )
        self.has_threads = fork is not None

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instruction sets that the library can use on this CPU, best first, which is what it uses."""
        return tuple(self._instructions().decode().split())

    def set_instructions(self, name: str) -> None:
        """Use another instruction set, in the whole process: for tests and benchmarks.

        Raises:
            ValueError: this CPU or this library lacks it.
        """
        if not self._set_instructions(name.encode()):
            raise ValueError(f"instructions must be one of {', '.join(self.instructions)}, got {name!r}")
        self.used = name


@cache
def load() -> Library | OSError | RuntimeError:
    """The library, or why it cannot be used. Loaded once."""
    if not PATH.exists():
        return OSError(
            f"{PATH.name} was not built; installing the package from source builds it if a C++17 compiler is found"
        )
    try:
        return Library(PATH)
    except (OSError, RuntimeError) as error:
        return error


def _openmp_fork() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that PyTorch is linked to, if it has that function."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        # A library's symbols are looked up in what it is linked to as well; other packages may have loaded other runtimes.
        if path.exists() and hasattr(linked := ctypes.CDLL(str(path)), "GOMP_parallel"):
            return ctypes.cast(linked.GOMP_parallel, c_void_p).value
    return None
