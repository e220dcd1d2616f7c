"""Packed tensors of random bits, and the ops that read them."""

from functools import partial

import torch
from hf_pcdvq_kernels.random_weights import random_packed as random_packed_of_window

SETTINGS = ["pcdvq 2.0", "pcdvq 2.25", "ccq 2.75", "ccq 2.5", "ccq 2.0625", "stream 2.0", "stream 2.25", "stream 3.0"]


# Windows of 14 bits, so that not everything is tested with the default of 12.
random_packed = partial(random_packed_of_window, window=14)


def op_pair(setting):
    method = setting.split()[0]
    return getattr(torch.ops.hf_pcdvq_kernels, f"{method}_dequantize"), getattr(
        torch.ops.hf_pcdvq_kernels, f"{method}_matmul"
    )


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()
