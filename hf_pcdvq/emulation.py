"""Computing in float32 on CPUs that have no instructions for the 16-bit floats that models are saved in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` is a CPU that has no instructions for matrix products in `dtype` and therefore emulates them.

    With AVX2 alone, products of bfloat16 were measured to take four to six times as long as those of float32; with
    the bfloat16 instructions of AVX-512, half as long.
    """
    if device.type != "cpu" or dtype not in _SIXTEEN_BIT:
        return False
    # oneDNN multiplies 16-bit floats on a CPU. PyTorch has no public function that says what it supports.
    if not torch.backends.mkldnn.is_available():
        return True
    supported = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return not supported._is_mkldnn_bf16_supported()
    return not supported._is_mkldnn_fp16_supported()


def to_device(tensor: Tensor, device: torch.device, upcast: bool) -> Tensor:
    """The tensor on `device`; with `upcast`, 16-bit floats become float32."""
    return tensor.to(device, torch.float32 if upcast and tensor.dtype in _SIXTEEN_BIT else tensor.dtype)


@contextmanager
def placed(module: nn.Module, device: torch.device, upcast: bool) -> Iterator[None]:
    """Hold a module on `device`, with `upcast` its 16-bit floats in float32; exiting restores device and dtypes.

    Integer tensors that have replaced floating ones by then keep their dtype.
    """
    home = next(module.parameters()).device
    module.to(device)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(module) if upcast and tensor.dtype in _SIXTEEN_BIT}
    _convert(module, dict.fromkeys(dtypes, torch.float32))
    try:
        yield
    finally:
        _convert(module, dtypes)
        module.to(home)


def _convert(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, tensor in _tensors(module):
        if name in dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
