"""The rotation: its signs are part of the format, and its blocks fit every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_pcdvq.codecs import hadamard


def naive_sign(j, seed):
    """The formula from the module's docstring, with explicit 32-bit wraparound."""
    x = (j + 0x9E3779B9 * (seed + 1)) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    return -1.0 if x % 2 else 1.0


@given(st.integers(0, 10), st.integers(0, 2**31 - 1))
def test_signs_follow_the_formula(power, seed):
    block = 1 << power
    assert hadamard.signs(block, seed).tolist() == [naive_sign(j, seed) for j in range(block)]


@pytest.mark.parametrize(
    "features, block", [(576, 64), (1536, 128), (11008, 128), (13696, 128), (4096, 128), (24, 8), (7, 1)]
)
def test_block_is_the_largest_power_of_two_that_fits(features, block):
    assert hadamard.block_size(features, 128) == block


@pytest.mark.parametrize("features", [576, 1536, 24])
def test_the_product_is_unchanged(features):
    signs = hadamard.signs(hadamard.block_size(features, 128), 3)
    weight, x = torch.randn(5, features, dtype=torch.float64), torch.randn(7, features, dtype=torch.float64)
    rotated = hadamard.rotate(x, signs) @ hadamard.rotate(weight, signs).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hadamard.unrotate(hadamard.rotate(x, signs), signs), x, rtol=1e-10, atol=1e-10)


def test_a_slice_at_block_borders_rotates_like_the_whole():
    """Allows tensor parallelism to shard the inputs."""
    signs = hadamard.signs(64, 0)
    x = torch.randn(2, 576, dtype=torch.float64)
    torch.testing.assert_close(hadamard.rotate(x, signs)[:, 192:384], hadamard.rotate(x[:, 192:384], signs))
