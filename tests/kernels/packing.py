"""Packed tensors of random bits, and the ops that read them."""

import torch
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.formats import family_of

# Formats with kernels, covering every way to decode.
SETTINGS = ["pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "stream-2.0", "stream-2.25", "stream-3.0"]


def random_packed(setting, *shape, **options):
    # Windows of 14 bits, so that not only the default of 12 is tested.
    parameters = {"window_bits": 14} if "window_bits" in family_of(setting).parameters(setting) else {}
    return random_weights.random_packed(setting, *shape, **parameters, **options)


def family(setting):
    return family_of(setting).family


def op_pair(setting):
    namespace = torch.ops.hf_pcdvq_kernels
    return getattr(namespace, f"{family(setting)}_dequantize"), getattr(namespace, f"{family(setting)}_matmul")


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def random_stack(setting, number, rows, columns):
    """Weights that share tables, and the op arguments for a stack of them."""
    described = family_of(setting).arguments
    weights = [random_packed(setting, rows, columns, seed=seed) for seed in range(number)]
    for weight in weights:
        for index, argument in enumerate(described):
            if not argument.stacked:
                weight[index] = weights[0][index]
    stacked = [
        torch.stack(items) if argument.stacked and items[0] is not None else items[0]
        for argument, items in zip(described, zip(*weights))
    ]
    return weights, stacked
