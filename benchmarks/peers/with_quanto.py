"""optimum-quanto: rounding to nearest, without calibration. Options: bits, group_size."""

import torch
from adapter import each_weight
from optimum.quanto import MaxOptimizer, qtypes, quantize_weight


def quantize(weight, inputs, bits, group_size):
    weight, kind = weight.to(torch.bfloat16), qtypes[f"qint{bits}"]
    # As its QLinear does: the group size must divide the number of inputs.
    while weight.shape[1] % group_size:
        group_size -= 32
    scale, shift = MaxOptimizer()(weight, kind, 0, group_size)
    packed = quantize_weight(weight, kind, 0, scale, shift, group_size, optimized=False)
    nbytes = packed._data._data.nbytes + packed._scale.nbytes + packed._shift.nbytes
    return packed.dequantize(), nbytes


each_weight("optimum-quanto", quantize)
