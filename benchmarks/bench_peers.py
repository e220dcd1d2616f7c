"""Products of other projects, for benchmarks/bench_kernels.py. Each project is imported only when it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """`run(x)` returns `x @ W.T` for x `[n, in]` and a weight W `[out, in]` that takes `nbytes` bytes."""

    run: Callable[[Tensor], Tensor]
    nbytes: int


def bitsandbytes_nf4(outputs: int, inputs: int, seed: int, device: torch.device) -> Product:
    """4-bit NormalFloat in blocks of 64, which reads 4.5 bits per weight."""
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return Product(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state), packed.nbytes + state.absmax.nbytes)


def gemlite_2bit(outputs: int, inputs: int, seed: int, device: torch.device) -> Product:
    """2-bit integers in groups of 64, each with a scale and a zero point, 2.5 bits per weight."""
    from gemlite import DType, GemLiteLinear

    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(4, (outputs, inputs), generator=generator, device=device, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // 64, generator=generator, device=device).to(torch.bfloat16)
    layer = GemLiteLinear(
        2, group_size=64, in_features=inputs, out_features=outputs, input_dtype=DType.BF16, output_dtype=DType.BF16
    )
    layer.pack(codes, scales, torch.full_like(scales, 1.5))
    return Product(layer.forward, sum(tensor.nbytes for tensor in layer.get_tensor_args()))


PEERS = {"bitsandbytes nf4": bitsandbytes_nf4, "gemlite 2-bit": gemlite_2bit}
