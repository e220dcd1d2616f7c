"""HQQ: half-quadratic quantization, without calibration. Options: bits, group_size."""

import torch
from adapter import each_weight
from hqq.core.quantize import Quantizer


def quantize(weight, inputs, bits, group_size):
    options = {"nbits": bits, "group_size": group_size, "axis": 1, "device": "cpu", "compute_dtype": torch.float16}
    codes, meta = Quantizer.quantize(weight, **options)
    codes, meta = Quantizer.to_inplace(codes, {**meta, "compute_dtype": torch.float16}, "cpu")
    nbytes = codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
    return Quantizer.dequantize(codes, meta), nbytes


each_weight("hqq", quantize)
