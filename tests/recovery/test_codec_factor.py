"""A factor on the rows of a packed weight."""

import pytest
import torch

from hf_pcdvq.codecs import SETTINGS, codec_of_setting

ROWS, COLUMNS = 48, 128


@pytest.fixture(params=sorted(SETTINGS), scope="module")
def packed(request):
    codec = codec_of_setting(request.param, 128, 0)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return codec, codec.encode(weight), codec.tables(COLUMNS)


def test_rows_decode_to_their_multiples_and_codes_are_the_same_bytes(packed):
    codec, tensors, tables = packed
    factor = torch.linspace(0.25, 4, ROWS)
    changed = codec.with_factor(tensors, factor)
    expected = codec.decode(tensors, tables, torch.float64) * factor.double()[:, None]
    torch.testing.assert_close(codec.decode(changed, tables, torch.float64), expected, rtol=1e-5, atol=1e-5)
    assert changed.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert changed[suffix].dtype == tensor.dtype
        assert suffix == "scale" or torch.equal(changed[suffix], tensor)


def test_the_scale_is_rounded_once(packed):
    codec, tensors, _ = packed
    factor = 1 + torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
    exact = tensors["scale"].double() * factor
    found = codec.with_factor(tensors, factor)["scale"]
    step = torch.nextafter(found, torch.full_like(found, torch.inf)).double() - found.double()
    assert ((found.double() - exact).abs() <= step / 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_factor_makes_a_scale_infinite(packed, dtype):
    codec, tensors, _ = packed
    large = {**tensors, "scale": torch.full((ROWS,), torch.finfo(dtype).max, dtype=dtype)}
    found = codec.with_factor(large, torch.full((ROWS,), 4.0))["scale"]
    assert found.dtype == dtype and torch.isfinite(found).all()


def test_stacks_have_factors_by_expert_and_row(packed):
    codec, tensors, tables = packed
    stack = {suffix: torch.stack([tensor, tensor]) for suffix, tensor in tensors.items()}
    factor = torch.stack([torch.ones(ROWS), torch.full((ROWS,), 2.0)])
    changed = codec.with_factor(stack, factor)
    twice = codec.decode({suffix: tensor[1] for suffix, tensor in changed.items()}, tables, torch.float64)
    torch.testing.assert_close(twice, 2 * codec.decode(tensors, tables, torch.float64), rtol=1e-5, atol=1e-5)
    assert torch.equal(changed["scale"][0], tensors["scale"])
