"""torchao: rounding to nearest, without calibration. Options: bits, group_size.

torchao stores each code in a byte; the bytes are counted as if the codes were packed.
"""

import torch
from adapter import each_weight
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_


def quantize(weight, inputs, bits, group_size):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    quantize_(layer, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(group_size)))
    # Symmetric, so there are no zero points to store.
    return layer.weight.dequantize(), weight.numel() * bits // 8 + layer.weight.scale.nbytes


each_weight("torchao", quantize)
