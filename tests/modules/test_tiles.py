"""Experts as run on a GPU: (token, expert) pairs arranged in tiles, one product for all experts."""

import pytest
import torch
from hf_pcdvq_kernels.routing import tiles_of_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import EXPERTS, model

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.modules import QuantExperts, encode_stack


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=400),
    st.sampled_from((1, 8)),
)
@settings(deadline=None, max_examples=60)
def test_every_pair_has_a_place_of_its_own_in_a_tile_of_its_expert(index, number):
    index = torch.tensor(index)
    experts, place, size = tiles_of_tokens(index, number)
    assert experts.dtype == torch.int32 and len(set(place.tolist())) == len(index)
    assert 0 <= place.min() and place.max() < len(experts) * size
    assert torch.equal(experts[place // size], torch.where(index < number, index, -1).to(torch.int32))
    # The number of tiles depends on sizes alone, so no synchronization with the device is needed.
    assert len(experts) == len(tiles_of_tokens(torch.zeros_like(index), number)[0])


def experts_of(codec, kind="mixtral"):
    dense = model(kind).get_submodule("model.layers.1.mlp.experts").to(torch.bfloat16)
    packed = {stack: encode_stack(codec, getattr(dense, stack)) for stack in ("gate_up_proj", "down_proj")}
    return QuantExperts.from_packed(dense, codec, packed)


CODECS = {
    "pcdvq": PcdvqConfig().codec,
    "stream": CcqConfig(layout="stream").codec,
    "int8": PcdvqConfig(overrides={"x": "int8"}).codec_of("x"),
}


@pytest.mark.parametrize("tokens", (1, 30, 150))
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@torch.no_grad()
def test_in_tiles_and_expert_by_expert_are_the_same(codec, tokens):
    experts = experts_of(codec)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 64, generator=generator).bfloat16()
    index = torch.randint(0, EXPERTS + 1, (tokens, 3), generator=generator)  # some on another device
    weights = torch.rand(tokens, 3, generator=generator)
    expected = experts(hidden, index, weights)
    out = experts._forward_in_tiles(hidden, index, weights)
    # The sums of three experts' bfloat16 results, in a different order, and on a CPU of different kernels.
    assert (out - expected).float().norm() <= 6e-3 * expected.float().norm()


def test_gradients_reach_the_tokens():
    experts = experts_of(CODECS["pcdvq"]).float()
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7], [3, 3]])
    weights = torch.full((6, 2), 0.5)
    (experts(hidden, index, weights) ** 2).sum().backward()
    found, hidden.grad = hidden.grad, None
    (experts.dequantize(torch.float32)(hidden, index, weights) ** 2).sum().backward()
    assert (found - hidden.grad).norm() / hidden.grad.norm() < 1e-4
