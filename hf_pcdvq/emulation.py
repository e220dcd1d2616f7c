"""Computing in float32 where a CPU has no instructions for the 16-bit floats that models are saved in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SHORT = (torch.bfloat16, torch.float16)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device is a CPU without instructions for products of `dtype`, which it then emulates.

    With AVX2 alone, products of bfloat16 were measured to take four to six times as long as those of float32; with the bfloat16
    instructions of AVX-512, half as long.
    """
    if device.type != "cpu" or dtype not in _SHORT:
        return False
    # oneDNN multiplies 16-bit floats on a CPU. PyTorch has no public function that says what it supports.
    if not torch.backends.mkldnn.is_available():
        return True
    supported = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return not supported._is_mkldnn_bf16_supported()
    return not supported._is_mkldnn_fp16_supported()


def moved(tensor: Tensor, device: torch.device, widen: bool) -> Tensor:
    """A tensor on `device`; one of 16-bit floats in float32, if `widen`."""
    return tensor.to(device, torch.float32 if widen and tensor.dtype in _SHORT else tensor.dtype)


@contextmanager
def placed(module: nn.Module, device: torch.device, widen: bool) -> Iterator[None]:
    """A module on `device`, its 16-bit floats in float32 if `widen`; afterwards on its own device in its own dtypes.

    Parameters that are replaced meanwhile are only moved back.
    """
    home = next(module.parameters()).device
    module.to(device)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(module) if widen and tensor.dtype in _SHORT}
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
