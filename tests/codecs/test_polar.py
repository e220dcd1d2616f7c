"""PCDVQ: bit-exact decoding of every word, exactness of the encoder, distortion, and edge cases."""

import struct
import sys

import pytest
import torch
from hf_pcdvq_kernels.constants import codebook_digest
from hypothesis import given
from hypothesis import strategies as st

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.codecs import base
from hf_pcdvq.codecs.codebook import codebook_hash, load_codebook
from hf_pcdvq.codecs.directions import nearest_direction, reference
from hf_pcdvq.codecs.polar import nearest_level, row_scale


def codec(bits, magnitude="projection", block=8):
    return PcdvqConfig(bits=bits, magnitude=magnitude, hadamard_block=block).codec


def float32(value):
    """Round a Python float to float32, to evaluate the formula one operation at a time."""
    return struct.unpack("f", struct.pack("f", value))[0]


def naive_vector(bits, word, magnitude_byte, position, scale, patterns, levels):
    """One 8-vector from the layout table in the codec's docstring, in plain Python numbers."""
    word &= 0xFFFF
    signs = [word >> j & 1 for j in range(7)]
    signs.append(sum(signs) % 2)
    if bits == 2.0:
        pattern, level = word >> 7 & 127, word >> 14
    else:
        pattern, level = word >> 7, magnitude_byte >> 2 * (position % 4) & 3
    factor = float32(scale * levels[level])
    return [float32(factor * ((-1) ** sign * coordinate)) for sign, coordinate in zip(signs, patterns[pattern])]


@pytest.mark.parametrize("bits", [2.0, 2.25])
def test_every_word_decodes_as_the_layout_says(bits):
    format_ = codec(bits)
    tables = format_.tables(8 * 512)
    patterns, levels = tables["patterns"].tolist(), tables["levels"].tolist()
    generator = torch.Generator().manual_seed(0)
    rows, vectors = 128, 512
    words = torch.randperm(1 << 16, generator=generator).view(rows, vectors)
    packed = {
        "": torch.stack([words & 255, words >> 8], -1).flatten(1).to(torch.uint8),
        "scale": torch.rand(rows, generator=generator) + 0.01,
    }
    if bits == 2.25:
        packed["magnitude"] = torch.randint(0, 256, (rows, vectors // 4), generator=generator).to(torch.uint8)
    decoded = format_.decode_rotated(packed, tables, torch.float32).view(rows, vectors, 8).tolist()
    words, scales = words.tolist(), packed["scale"].tolist()
    magnitudes = packed["magnitude"].tolist() if bits == 2.25 else None
    for n in range(rows):
        for v in range(vectors):
            byte = magnitudes[n][v // 4] if magnitudes else 0
            assert decoded[n][v] == naive_vector(bits, words[n][v], byte, v, scales[n], patterns, levels)


def unit_patterns(count):
    patterns = load_codebook("pcdvq-a14-v1" if count == 128 else "pcdvq-a16-v1")["patterns"].float()
    return patterns / patterns.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("search", [nearest_direction, reference.search], ids=["chosen", "reference"])
@pytest.mark.parametrize("count", [128, 512])
def test_the_chosen_direction_is_the_best_of_all(count, search):
    """Against an explicit table of every direction: all patterns with all even sign flips."""
    unit = unit_patterns(count)
    flips = torch.tensor([[1 - 2 * (bits >> j & 1) for j in range(8)] for bits in range(256)])
    even = flips[flips.prod(1) == 1]
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    directions = (unit[:, None] * even).view(-1, 8)
    assert len(directions) == count * 128
    index, signs, projection = search(vectors, unit)
    assert torch.allclose(projection, (vectors @ directions.T).amax(1), rtol=1e-5)
    parity = sum(signs >> j & 1 for j in range(7)) & 1
    chosen = unit[index.long()] * torch.stack([1 - 2 * (signs >> j & 1) for j in range(7)] + [1 - 2 * parity], 1)
    assert torch.allclose((vectors * chosen).sum(1), projection, rtol=1e-5)


@pytest.mark.parametrize("count", [128, 512])
def test_compiled_search_finds_what_the_reference_finds(count):
    compiled = pytest.importorskip(
        "hf_pcdvq.codecs.directions.numba", reason="Numba is not installed", exc_type=ImportError
    )
    unit = unit_patterns(count)
    vectors = torch.randn(3001, 8, generator=torch.Generator().manual_seed(2))
    vectors[:300] = vectors[:300].round()  # with zeros, and coordinates of one size
    vectors[7] = 0
    found, expected = compiled.search(vectors, unit), reference.search(vectors, unit)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)
    # Rounded vectors can be as near to one direction as to another.
    assert all(torch.equal(a[300:], b[300:]) for a, b in zip(found[:2], expected[:2]))


def test_without_numba_it_says_so_and_finds_the_same(monkeypatch):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    expected = codec(2.25).encode(weight)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(UserWarning, match=r"encoding PCDVQ .* without Numba \(pip install numba\)"):
        packed = codec(2.25).encode(weight)
    assert all(torch.equal(packed[suffix], tensor) for suffix, tensor in expected.items())


# Mean squared error per weight on unit-variance normal weights.
DISTORTION = {
    (2.0, "norm"): 0.1000,
    (2.25, "norm"): 0.0688,
    (2.0, "projection"): 0.0977,
    (2.25, "projection"): 0.0677,
}


@pytest.mark.parametrize("bits, magnitude", DISTORTION)
@pytest.mark.parametrize("inputs", [576, 1024])
def test_distortion_on_normal_weights(bits, magnitude, inputs):
    format_ = codec(bits, magnitude, block=128)
    weight = torch.randn(1024, inputs, generator=torch.Generator().manual_seed(inputs))
    decoded = format_.decode(format_.encode(weight), format_.tables(inputs), torch.float32)
    assert (weight - decoded).square().mean() == pytest.approx(DISTORTION[bits, magnitude], rel=0.02)


def test_the_rotation_pays_on_weights_with_outliers():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[:, ::64] *= 20
    errors = []
    for block in (8, 128):
        format_ = codec(2.25, block=block)
        decoded = format_.decode(format_.encode(weight), format_.tables(512), torch.float32)
        errors.append((weight - decoded).square().sum() / weight.square().sum())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("bits", [2.0, 2.25])
@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-30, 2.0**110])  # powers of two, which cause no rounding
def test_scaling_the_weight_scales_the_result(bits, factor):
    format_ = codec(bits)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    packed, scaled = format_.encode(weight), format_.encode(weight * factor)
    tables = format_.tables(64)
    expected = format_.decode(packed, tables, torch.float32) * factor
    torch.testing.assert_close(format_.decode(scaled, tables, torch.float32), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2.0, 2.25])
def test_rows_of_zeros_stay_zero(bits):
    format_ = codec(bits)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    weight[1] = 0
    decoded = format_.decode(format_.encode(weight), format_.tables(64), torch.float32)
    assert not decoded[1].any() and decoded[0].any() and torch.isfinite(decoded).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_and_stride_encodes_alike(dtype):
    format_ = codec(2.0)
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    packed, strided = format_.encode(weight.T.contiguous()), format_.encode(weight.T)
    assert all(torch.equal(packed[name], strided[name]) for name in packed)


def test_slices_of_rows_encode_like_the_whole(monkeypatch):
    format_ = codec(2.25, block=64)
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(5))
    whole, tables = format_.encode(weight), format_.tables(64)
    decoded = format_.decode(whole, tables, torch.float32)
    monkeypatch.setattr(base, "_SLICE", {"cpu": 64 * 7})
    cut = format_.encode(weight)
    # Rotating fewer rows at a time may sum in a different order, which moves a vector that lies between two codes.
    assert cut[""].shape == whole[""].shape and (cut[""] == whole[""]).float().mean() > 0.98
    torch.testing.assert_close(cut["scale"], whole["scale"])
    torch.testing.assert_close(format_.decode(whole, tables, torch.float32), decoded)


REFUSED = [
    (torch.zeros(4, 60), "60 input features are not a multiple of 32"),
    (torch.zeros(64), r"expected a floating-point weight \[N, K\]"),
    (torch.zeros(4, 64, dtype=torch.int32), r"expected a floating-point weight .* torch.int32"),
    (torch.full((4, 64), float("inf")), "infinite or NaN"),
]


@pytest.mark.parametrize("weight, message", REFUSED)
def test_unfit_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        codec(2.25).encode(weight)


@given(st.integers(0, 511), st.integers(0, 127), st.integers(0, 3), st.integers(1, 9))
def test_packing_keeps_every_field(pattern, signs, level, rows):
    """Packing 2.25: fields read back from the words and bytes by the layout table."""
    vectors = 4
    fields = [torch.full((rows * vectors,), value, dtype=torch.int32) for value in (pattern, signs, level)]
    packed = codec(2.25).pack(*fields, torch.ones(rows))
    assert packed[""].shape == (rows, 2 * vectors) and packed["magnitude"].shape == (rows, 1)
    low, high = packed[""][-1, -2:].tolist()
    word, byte = low | high << 8, packed["magnitude"][-1, 0].item()
    assert (word >> 7, word & 127) == (pattern, signs)
    assert [byte >> 2 * v & 3 for v in range(4)] == [level] * 4


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20))
def test_nearest_level_is_nearest(values):
    levels = torch.tensor([-1.0, 0.5, 2.0, 7.0])
    tensor = torch.tensor(values)
    distance = (tensor[:, None] - levels).abs()
    chosen = distance.gather(1, nearest_level(tensor, levels).long()[:, None])[:, 0]
    assert torch.equal(chosen, distance.amin(1))


def test_row_scale_is_the_root_mean_square():
    assert row_scale(torch.tensor([[3.0, -4.0], [0.0, 0.0]])).tolist() == pytest.approx([12.5**0.5, 0.0])


@pytest.mark.parametrize("name, count", [("pcdvq-a14-v1", 128), ("pcdvq-a16-v1", 512)])
def test_shipped_codebooks_are_what_the_format_says(name, count):
    tensors = load_codebook(name)
    patterns = tensors["patterns"]
    assert patterns.shape == (count, 8) and patterns.dtype == torch.int8 and (patterns >= 0).all()
    assert ((patterns.float().norm(dim=1) - 127).abs() < 2).all()
    assert len(patterns.unique(dim=0)) == count
    for levels in ("levels_norm", "levels_projection"):
        assert tensors[levels].dtype == torch.float32 and (tensors[levels].diff() > 0).all()
    assert codebook_hash(name) == codebook_digest(tensors)
    changed = {**tensors, "patterns": patterns.roll(1, 0)}
    assert codebook_digest(changed) != codebook_hash(name)


def test_relative_error_is_that_of_the_decoded_weight(monkeypatch):
    format_ = codec(2.25, block=64)
    weight = torch.randn(50, 192, generator=torch.Generator().manual_seed(6)) * torch.rand(50, 1)
    packed = format_.encode(weight)
    decoded = format_.decode(packed, format_.tables(192), torch.float64)
    expected = ((decoded - weight).square().sum() / weight.square().sum()).item()
    monkeypatch.setattr(base, "_SLICE", {"cpu": 192 * 7})
    assert format_.relative_error(weight, packed) == pytest.approx(expected, rel=1e-5)
    assert format_.relative_error(torch.zeros(2, 192), format_.encode(torch.zeros(2, 192))) == 0


def test_the_default_dtype_does_not_matter():
    """Transformers changes it while building a model."""
    format_ = codec(2.25, block=64)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    expected = format_.encode(weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        packed, tables = format_.encode(weight), format_.tables(64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(packed[name], expected[name]) for name in packed)
    assert tables["signs"].dtype == tables["levels"].dtype == torch.float32
