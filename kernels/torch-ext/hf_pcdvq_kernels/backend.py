"""Which implementation an op runs: the Triton kernels, the library of the CPU backend, or the PyTorch reference."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch

BACKENDS = ("auto", "cpu", "triton", "reference")
_DEVICES = ("cuda", "xpu")  # ROCm devices are also of type cuda


def constant_when_compiled(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, which imports the whole compiler, and with it Triton, at once."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


class _Choice:
    """The user's choice, process-wide: threads that generate text must see it too."""

    backend = "auto"


def set_backend(backend: str) -> None:
    """Choose the implementation of all ops in this process.

    Args:
        backend: `"auto"`, Triton kernels for tensors on a GPU, the compiled library on a CPU, and PyTorch for all others;
            `"triton"` or `"cpu"`, only these, which raise where they have no kernels for the device or dtype; or
            `"reference"`, PyTorch everywhere. Formats without kernels run in PyTorch whatever is chosen. The searches that
            encode PCDVQ and the stream layout obey the choice too.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    _Choice.backend = backend


def get_backend() -> str:
    """The backend chosen with `set_backend`; `"auto"` by default."""
    return _Choice.backend


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """What runs an op on this device, with activations of this dtype: `"triton"`, `"cpu"` or `"reference"`.

    Raises:
        RuntimeError: the chosen backend cannot run it.
    """
    if use_triton(device, dtype):
        return "triton"
    return "cpu" if use_cpu(device, dtype) else "reference"


def use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an op on this device, with activations or a result of this dtype, runs on Triton kernels.

    Raises:
        RuntimeError: the backend is `"triton"`, and Triton cannot run the op.
    """
    if _Choice.backend in ("reference", "cpu") or (_Choice.backend == "auto" and device.type not in _DEVICES):
        return False
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        return True
    if _Choice.backend == "triton":
        raise RuntimeError(
            f"the backend is set to 'triton', but {obstacle}; set_backend('auto') runs PyTorch instead"
        )
    _warn_once(f"hf_pcdvq decodes with PyTorch, which is slow, because {obstacle}")
    return False


def use_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an op on this device, with activations or a result of this dtype, runs on the library of the CPU backend.

    Raises:
        RuntimeError: the backend is `"cpu"`, and the library cannot run the op.
    """
    if _Choice.backend in ("reference", "triton") or (_Choice.backend == "auto" and device.type != "cpu"):
        return False
    obstacle = _cpu_obstacle(device, dtype)
    if obstacle is None:
        return True
    if _Choice.backend == "cpu":
        raise RuntimeError(f"the backend is set to 'cpu', but {obstacle}; set_backend('auto') runs PyTorch instead")
    if dtype != torch.float64:  # rare, and asked for because it is exact
        _warn_once(f"hf_pcdvq decodes with PyTorch, which is slow, because {obstacle}")
    return False


# `torch.compile` looks through caches, into what it cannot trace: it is told to take these results as constants.
@constant_when_compiled
def _cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library of the CPU backend cannot run, or None."""
    if device.type != "cpu":
        return f"the library has no kernels for the device {device.type!r}"
    if dtype == torch.float64:
        return "the kernels do not compute in float64"
    return _library_obstacle()


@cache
def _library_obstacle() -> str | None:
    from .cpu import library

    loaded = library.load()
    return None if isinstance(loaded, library.Library) else f"the CPU kernels are missing: {loaded}"


@constant_when_compiled
def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run, or None."""
    if dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return _missing(device)


@cache
def _missing(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type not in _DEVICES:
        from .triton.device import INTERPRETED

        return None if INTERPRETED else f"Triton has no kernels for the device {device.type!r}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and Triton needs 8.0"
    return None


@constant_when_compiled
def _warn_once(message: str) -> None:
    _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
