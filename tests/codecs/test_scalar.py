"""The eight-bit codec for mixed recipes."""

import pytest
import torch

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.codecs.scalar import ScalarCodec


@pytest.fixture(params=(0, 128))
def codec(request):
    return ScalarCodec(request.param, 0)


def weight(rows=7, columns=264):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_decoding_by_hand():
    codec = ScalarCodec(0, 0)
    packed = {"": torch.tensor([[0x7F80FF01]], dtype=torch.int64).to(torch.int32)}
    packed["scale"] = torch.tensor([0.5])
    assert codec.decode(packed, {}, torch.float32).tolist() == [[0.5, -0.5, -64.0, 63.5]]


def test_error_and_product(codec):
    dense = weight()
    packed = codec.encode(dense)
    assert packed[""].shape == (7, 66) and packed[""].dtype == torch.int32
    assert codec.relative_error(dense, packed) < 2e-4
    tables = codec.tables(264)
    x = torch.randn(3, 264, generator=torch.Generator().manual_seed(1))
    expected = x @ codec.decode(packed, tables, torch.float32).T
    out = codec.matmul(x, packed, tables)
    assert (out - expected).norm() / expected.norm() < 3e-4  # the CPU kernels quantize activations to 15 bits
    half = codec.matmul(x.bfloat16(), packed, tables)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() / expected.norm() < 0.01


def test_zero_rows_and_the_largest_weights(codec):
    dense = weight()
    dense[2] = 0
    dense[3] *= 1e30
    dense[4] *= 1e-30
    decoded = codec.decode(codec.encode(dense), codec.tables(264), torch.float32)
    assert not decoded[2].any()
    error = (decoded - dense).double().norm(dim=1) / dense.double().norm(dim=1).clamp(min=1e-300)
    assert error.max() < 0.02


def test_feedback_units_decode_to_what_they_say(codec):
    rotated = weight()
    encoder = codec.unit_encoder(rotated)
    codes, values = zip(*(encoder.encode(unit, rotated[:, columns]) for unit, columns in enumerate(encoder.units)))
    decoded = codec.decode_rotated(encoder.pack(torch.stack(codes, 1)), {}, torch.float32)
    assert torch.equal(decoded, torch.cat(values, 1))
    encoder.rescale(torch.full((7,), 2.0))
    doubled = codec.decode_rotated(encoder.pack(torch.stack(codes, 1)), {}, torch.float32)
    assert torch.equal(doubled, 2 * decoded)


def test_it_is_for_overrides_alone():
    assert PcdvqConfig(overrides={"attn": "int8"}).codec_of("layers.0.attn.q").bits == 8
    with pytest.raises(ValueError, match="overrides.*'9 bits'"):
        PcdvqConfig(overrides={"attn": "9 bits"})
    with pytest.raises(ValueError, match="not a regular expression"):
        PcdvqConfig(overrides={"(": "int8"})
