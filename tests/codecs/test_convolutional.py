"""The CCQ codec against element-by-element decoders written from its layout table, and against brute force."""

import math
import struct
from itertools import product

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels.formats.ccq import CCQ_LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pcdvq.codecs import convolutional
from hf_pcdvq.codecs.base import counted_bits
from hf_pcdvq.codecs.convolutional import ConvolutionalCodec

LAYOUTS = ("2.75", "2.5", "2.0625")
WORDS = {"2.75": 22, "2.5": 10, "2.0625": 16}


def codec(layout: str, max_block: int = 0) -> ConvolutionalCodec:
    return ConvolutionalCodec(max_block, 0, layout)


def dequantize(packed: dict, layout: str, dtype=torch.float32) -> torch.Tensor:
    return codec(layout).decode_rotated(packed, {}, dtype)


def relative_error(weight: torch.Tensor, layout: str) -> float:
    decoded = dequantize(codec(layout).encode(weight), layout).double()
    return ((decoded - weight.double()).square().sum() / weight.double().square().sum()).item()


# ----------------------------------------------------------------- naive decoders, from the codec's layout table


def float32(x: float) -> float:
    """A Python float rounded to float32; products and sums of two float32 round once, through float64, exactly."""
    return struct.unpack("f", struct.pack("f", x))[0]


def values_275(byte: int) -> list[int]:
    return [((byte >> shift) & 0xF) - 8 for shift in (4, 2, 0)]


def values_25(word: int) -> list[int]:
    return [((word >> shift) & 0x7) - 4 for shift in (13, 11, 9, 6, 4, 2, 0)]


def values_20625(byte: int, code_scale: float, code_zero: float) -> list[int]:
    code = math.floor(float32(float32(float32(byte * code_scale) + code_zero) + 0.5))
    return [((code >> shift) & 0x3F) - 32 for shift in (9, 6, 3, 0)]


def naive_decode(packed: dict, layout: str) -> list[list[float]]:
    """Every weight as a float32 held in a Python float."""
    per_group = WORDS[layout]
    decoded = []
    for n, row in enumerate(packed[""].tolist()):
        if layout == "2.5":
            row = [low | high << 8 for low, high in zip(row[::2], row[1::2])]
        scale = packed["scale"][n].item()
        weights = []
        for g in range(len(row) // per_group):
            words = row[g * per_group : (g + 1) * per_group]
            if layout == "2.75":
                integer_scale = words[21] & 0xF
                values = [value for word in words for value in values_275(word)]
            elif layout == "2.5":
                integer_scale = words[9] & 0x1FFF
                values = [value for word in words for value in values_25(word)]
            else:
                byte = packed["local_scale"][n, g // 2].item()
                integer_scale = byte & 0xF if g % 2 else byte >> 4
                map_ = packed["code_scale"][n].item(), packed["code_zero"][n].item()
                values = [value for word in words for value in values_20625(word, *map_)]
            group_scale = float32(integer_scale * scale)
            weights += [float32(group_scale * value) for value in values[:64]]
        decoded.append(weights)
    return decoded


def same_bits(decoded: torch.Tensor, expected: list[list[float]]) -> bool:
    return torch.equal(decoded.view(torch.int32), torch.tensor(expected, dtype=torch.float32).view(torch.int32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_words_decode_by_the_table(layout):
    groups = 65536 if layout == "2.5" else 256
    words = torch.zeros(1, groups, WORDS[layout], dtype=torch.int32)
    words[0, :, 0] = torch.arange(groups)  # the first word of each group, which holds no scale
    packed = convolutional.pack(words, torch.ones(1, groups, dtype=torch.int32), torch.ones(1), CCQ_LAYOUTS[layout])
    first = dequantize(packed, layout).view(groups, 64)
    if layout == "2.75":
        expected = [values_275(word) for word in range(256)]
    elif layout == "2.5":
        expected = [values_25(word) for word in range(65536)]
    else:
        map_ = convolutional.CODE_SCALE, convolutional.CODE_ZERO
        expected = [values_20625(word, *map_) for word in range(256)]
    assert torch.equal(first[:, : len(expected[0])], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_tensors_decode_bit_exactly(layout):
    generator = torch.Generator().manual_seed(0)
    rows, groups = 24, 5
    specs = codec(layout).specs(rows, 64 * groups)
    packed = {
        "": torch.randint(256, specs[""][0], dtype=torch.uint8, generator=generator),
        "scale": torch.rand(rows, generator=generator) * 10.0 ** torch.arange(-12, 12),
    }
    if layout == "2.0625":
        packed["local_scale"] = torch.randint(256, specs["local_scale"][0], dtype=torch.uint8, generator=generator)
        # Not the encoder's multiples of 1/16: published files hold arbitrary float32, rounded in every step.
        packed["code_scale"] = torch.rand(rows, generator=generator) * 128.4
        packed["code_zero"] = torch.rand(rows, generator=generator) * (32767 - 255 * packed["code_scale"])
    assert same_bits(dequantize(packed, layout), naive_decode(packed, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoded_weight_decodes_by_the_table(layout):
    weight = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    packed = codec(layout).encode(weight)
    assert same_bits(dequantize(packed, layout), naive_decode(packed, layout))


# --------------------------------------------------------------------------------------- exactness of the search


def squared_errors(vectors: torch.Tensor, candidates: list[list[int]]) -> torch.Tensor:
    """Least squared error of float64 `[n, windows]` over all candidates, by brute force."""
    table = torch.tensor(candidates, dtype=torch.float64)
    return torch.stack([(table - vector).square().sum(1).amin() for vector in vectors])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spread", (0.3, 1.0, 3.0))
def test_words_are_the_best_of_all(layout, spread):
    generator = torch.Generator().manual_seed(2)
    groups = 2 * spread * torch.randn(2, 2, 64, generator=generator) * (8 if layout == "2.0625" else 1)
    words = convolutional.best_words(groups, torch.ones(2, 2), CCQ_LAYOUTS[layout])
    packed = convolutional.pack(words, torch.ones(2, 2, dtype=torch.int32), torch.ones(2), CCQ_LAYOUTS[layout])
    error = (dequantize(packed, layout).view(-1, 64) - groups.view(-1, 64)).double().square()
    if layout == "2.75":
        candidates = [values_275(word) for word in range(256)]
    elif layout == "2.5":
        candidates = [values_25(word) for word in range(65536)]
    else:
        candidates = [values_20625(word, convolutional.CODE_SCALE, convolutional.CODE_ZERO) for word in range(256)]
    windows = len(candidates[0])
    whole = 64 - 64 % windows
    found = error[:, :whole].reshape(-1, windows).sum(1)
    expected = squared_errors(groups.view(-1, 64)[:, :whole].reshape(-1, windows).double(), candidates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if whole < 64:  # weight 63 has its own window
        single = [[value] for value in sorted({candidate[0] for candidate in candidates})]
        expected = squared_errors(groups.view(-1, 64)[:, 63:].double(), single)
        torch.testing.assert_close(error[:, 63], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_cover_the_group_and_code_words_agree_with_their_errors(layout):
    form = CCQ_LAYOUTS[layout]
    chains = convolutional.chains(form)
    assert [i for chain in chains for i in range(64)[chain.inputs]] == list(range(64))
    lengths = {"2.75": [3] * 21 + [1], "2.5": [3, 4] * 9 + [1], "2.0625": [4] * 16}
    assert [len(chain.shifts) for chain in chains] == lengths[layout]
    table = convolutional.search_table(form, torch.device("cpu"))
    values = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    for shifts in {chain.shifts for chain in chains}:
        code = convolutional.best_code(values[: len(shifts)], shifts, form, table).tolist()
        error = convolutional.chain_error(values[: len(shifts)], shifts, form, table)
        for i, word in enumerate(code):
            if layout == "2.0625":
                decoded = values_20625(word, convolutional.CODE_SCALE, convolutional.CODE_ZERO)
            else:
                mask = (1 << form.window_bits) - 1
                decoded = [((word >> shift) & mask) - form.offset for shift in shifts]
            distance = sum((v - d) ** 2 for v, d in zip(values[:, i].tolist(), decoded, strict=False))
            assert error[i].item() == pytest.approx(distance, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("layout", ("2.75", "2.0625"))
def test_group_scales_are_close_to_the_best_of_all(layout):
    form = CCQ_LAYOUTS[layout]
    groups = torch.randn(8, 9, 64, generator=torch.Generator().manual_seed(4))
    scale, chosen = convolutional.choose_scales(groups, form)

    def errors(integer_scale: torch.Tensor) -> torch.Tensor:
        words = convolutional.best_words(groups, integer_scale * scale[:, None], form)
        packed = convolutional.pack(words, integer_scale, scale, form)
        return (dequantize(packed, layout).view_as(groups) - groups).square().sum(2)

    every = torch.stack([errors(torch.full_like(chosen, integer)) for integer in range(16)])
    assert errors(chosen).sum() < 1.002 * every.amin(0).sum()


# ----------------------------------------------------------------------------------------------- the whole encoder


@pytest.mark.parametrize("columns", (576, 1024))
@pytest.mark.parametrize("layout, expected", (("2.75", 0.078), ("2.5", 0.094), ("2.0625", 0.110)))
def test_gaussian_error(layout, expected, columns):
    weight = torch.randn(384, columns, generator=torch.Generator().manual_seed(5))
    decoded = dequantize(codec(layout).encode(weight), layout)
    assert (decoded - weight).square().mean().item() < 1.02 * expected


@pytest.mark.parametrize("columns", (64, 192))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_specs(layout, columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(6))
    packed = codec(layout).encode(weight)
    specs = codec(layout).specs(5, columns)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in packed.items()} == specs
    assert all(tensor.is_contiguous() for tensor in packed.values())
    codes_and_group_scales = {suffix: spec for suffix, spec in specs.items() if suffix in ("", "local_scale")}
    padding = 4 / columns if layout == "2.0625" else 0  # an odd last group leaves a nibble unused
    assert counted_bits(codes_and_group_scales, 5, columns) == pytest.approx(codec(layout).bits + padding)
    assert relative_error(weight, layout) < 0.13


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_decode_to_zeros(layout):
    weight = torch.randn(4, 320, generator=torch.Generator().manual_seed(7))
    weight[1] = 0
    weight[2, 64:128] = 0
    weight[3, 256:] = 0
    packed = codec(layout).encode(weight)
    decoded = dequantize(packed, layout)
    assert torch.isfinite(packed["scale"]).all() and packed["scale"][1] == 0
    assert torch.equal((decoded == 0).view(4, 5, 64).all(2), (weight == 0).view(4, 5, 64).all(2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", (1e-20, 1e-30, 1e20, 1e37))
def test_tiny_and_huge_weights(layout, magnitude):
    weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(8))
    expected = relative_error(weight, layout)
    assert relative_error(weight * magnitude, layout) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", (1e-45, 1e-40, -1e-38))
def test_subnormal_weights_give_no_nan(layout, value):
    decoded = dequantize(codec(layout).encode(torch.full((2, 128), value)), layout)
    assert (decoded.abs() <= 2e-38).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heavy_tails(layout):
    """One group a thousand times larger, or one large weight per group, must not degrade the others unnecessarily."""
    weight = torch.randn(8, 640, generator=torch.Generator().manual_seed(9))
    large = weight.clone()
    large[:, :64] *= 1000
    assert relative_error(large, layout) < 0.125
    if layout == "2.5":  # 13 bits of group scale suffice for the small groups
        decoded = dequantize(codec(layout).encode(large), layout)
        assert (decoded - large)[:, 64:].square().mean() < 0.12
    spiked = weight.clone()
    spiked[:, ::64] *= 8
    assert relative_error(spiked, layout) < 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_chunks_are_independent(layout, monkeypatch):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(10))
    packed = codec(layout).encode(weight)
    alone = codec(layout).encode(weight[5:6])
    monkeypatch.setattr(convolutional, "_ELEMENTS", {"cpu": 5 * 256})
    chunked = codec(layout).encode(weight)
    for suffix, tensor in packed.items():
        assert torch.equal(tensor[5:6], alone[suffix])
        assert torch.equal(tensor, chunked[suffix])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_is_undone(layout):
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(11))
    rotated = codec(layout, max_block=128)
    tables = rotated.tables(192)
    packed = rotated.encode(weight)
    decoded = rotated.decode(packed, tables, torch.float32)
    assert (decoded - weight).square().mean() < 0.125
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(12))
    product_ = rotated.matmul(x, packed, tables)
    # The CPU kernels quantize activations to 15 bits.
    assert (product_ - x @ decoded.T).norm() < 3e-4 * product_.norm()


@pytest.mark.parametrize("layout, dtype", list(product(LAYOUTS, (torch.bfloat16, torch.float16))))
def test_other_dtypes(layout, dtype):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(13)).to(dtype)
    packed = codec(layout).encode(weight)
    assert all(torch.equal(tensor, packed[suffix]) for suffix, tensor in codec(layout).encode(weight.float()).items())
    assert torch.equal(dequantize(packed, layout, dtype), dequantize(packed, layout).to(dtype))


def test_default_dtype_does_not_matter():
    """Transformers builds models with the default dtype set to that of the checkpoint."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(14))
    expected = codec("2.0625").encode(weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        packed = codec("2.0625").encode(weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(packed[suffix], tensor) for suffix, tensor in expected.items())


def test_code_cluster_stays_in_its_bits():
    for constant in (convolutional.CODE_SCALE, convolutional.CODE_ZERO):
        assert constant >= 0 and constant * 16 == int(constant * 16)
    assert math.floor(255 * convolutional.CODE_SCALE + convolutional.CODE_ZERO + 0.5) < 1 << 15


# ------------------------------------------------------------------------------------------------------- packing


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), rows=st.integers(1, 3), groups=st.integers(1, 3))
def test_pack_keeps_words_and_scales(data, layout, rows, groups):
    per_group, largest_scale = WORDS[layout], {"2.75": 15, "2.5": 8191, "2.0625": 15}[layout]
    highest = 65535 if layout == "2.5" else 255

    def integers(maximum: int, *shape: int) -> torch.Tensor:
        count = math.prod(shape)
        drawn = data.draw(st.lists(st.integers(0, maximum), min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.int32).view(shape)

    words = integers(highest, rows, groups, per_group)
    if layout != "2.0625":
        words[..., -1] &= highest - largest_scale
    integer_scale = integers(largest_scale, rows, groups)
    drawn = data.draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=rows, max_size=rows))
    scale = torch.tensor(drawn, dtype=torch.float32)
    before = words.clone()
    packed = convolutional.pack(words, integer_scale, scale, CCQ_LAYOUTS[layout])
    assert torch.equal(words, before)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == codec(layout).specs(rows, 64 * groups)

    values = {
        "2.75": values_275,
        "2.5": values_25,
        "2.0625": lambda byte: values_20625(byte, convolutional.CODE_SCALE, convolutional.CODE_ZERO),
    }[layout]
    expected = []
    for n in range(rows):
        expected.append([])
        for g in range(groups):
            decoded = [value for word in words[n, g].tolist() for value in values(word)][:64]
            group_scale = float32(integer_scale[n, g].item() * scale[n].item())
            expected[-1] += [float32(group_scale * value) for value in decoded]
    assert same_bits(dequantize(packed, layout), expected)


# -------------------------------------------------------------------------------------------------------- errors


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be one of '2.75', '2.5', '2.0625', got '2.0'"):
        codec("2.0")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "weight, message",
    (
        (torch.zeros(4, 96), "not a multiple of 64"),
        (torch.zeros(128), "expected a floating-point weight"),
        (torch.zeros(4, 64, dtype=torch.int32), "expected a floating-point weight"),
        (torch.full((4, 64), math.inf), "infinite or NaN"),
        (torch.full((4, 64), math.nan), "infinite or NaN"),
    ),
)
def test_wrong_weights_are_refused(layout, weight, message):
    with pytest.raises(ValueError, match=message):
        codec(layout).encode(weight)


def test_companions_are_checked_on_decoding():
    packed = codec("2.0625").encode(torch.ones(2, 64))
    with pytest.raises(ValueError, match="code_zero is required"):
        dequantize({suffix: t for suffix, t in packed.items() if suffix != "code_zero"}, "2.0625")
    with pytest.raises(ValueError, match="local_scale must be None"):
        words = codec("2.75").encode(torch.ones(2, 64))[""]
        arguments = [words, packed["scale"], packed["local_scale"], None, None, "2.75"]
        ops.dequantize("ccq", arguments, torch.float32)
