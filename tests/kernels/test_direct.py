"""Which tensors a direct product still computes with."""

import gc

import pytest
import torch
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.direct import direct_product
from hf_pcdvq_kernels.formats import family_of
from torch import nn

SETTING = "pcdvq-2.25"


class Subclass(torch.Tensor):
    """As those that are divided among processes: its address is not that of what it stands for."""


@pytest.fixture
def packed():
    """The arguments of a weight [64, 256], whose words are as many as its rows."""
    return random_weights.random_packed(SETTING, 64, 256)


@pytest.fixture
def tensors(packed):
    return [value for value in packed if isinstance(value, torch.Tensor)]


@pytest.fixture
def product(packed, tensors):
    return direct_product(family_of(SETTING).family, packed, None, tensors)


def test_others_in_the_same_memory_are_held(product, tensors):
    assert product.holds(tensors)
    for _ in range(2):  # those of the last call are gone by the next
        again = [tensor.view_as(tensor) for tensor in tensors]
        assert product.holds(again) and product.holds(again)
        del again
        gc.collect()
    assert product.holds(tensors)


OTHERS = {
    "elsewhere": lambda words: words.clone(),
    "some of the rows": lambda words: words[:32],
    "some of the words": lambda words: words[:, :32],
    "another dtype": lambda words: words.view(torch.int8),
    "other strides": lambda words: words.T,
    "a parameter": lambda words: nn.Parameter(words, requires_grad=False),
    "a subclass": lambda words: words.as_subclass(Subclass),
    "on another device": lambda words: words.to("meta"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_different_ones_are_not(other, product, tensors):
    words, *rest = tensors
    assert words.shape == (64, 64) and words.dtype == torch.uint8
    assert not product.holds([OTHERS[other](words), *rest])
    assert product.holds(tensors)  # which are watched still


def test_those_that_are_moved_are_not(product, tensors):
    tensors[0].data = tensors[0].clone()
    assert not product.holds(tensors)


@pytest.mark.parametrize("index", range(4))
def test_every_one_counts(index, product, tensors):
    assert len(tensors) == 5  # words, magnitudes, scales, patterns, levels
    tensors[index + 1] = tensors[index + 1].clone()
    assert not product.holds(tensors)
