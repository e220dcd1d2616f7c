"""The stream layout against a bit-by-bit decoder written from its description, and its search against brute force."""

import subprocess
import sys
import warnings
from itertools import product

import hf_pcdvq_kernels
import pytest
import torch
from hf_pcdvq_kernels.formats.stream import STREAM_BITS, STREAM_WINDOW_BITS, stream_layout
from hf_pcdvq_kernels.reference import stream
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pcdvq.codecs import base, viterbi
from hf_pcdvq.codecs.base import counted_bits
from hf_pcdvq.codecs.stream import DEVIATION, StreamCodec

STRIDES = {2.0: [2], 2.25: [2, 2, 2, 3], 2.5: [2, 3], 3.0: [3], 4.0: [4]}


def codec(bits=2.0, window=12, max_block=0):
    return StreamCodec(max_block, 0, bits, window)


def decode(packed, bits, window=12):
    return codec(bits, window).decode_rotated(packed, {}, torch.float32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_value(window):
    total = 0
    for byte in (window * 0x8A7050F1 % 2**32).to_bytes(4, "little"):
        total += byte - 256 if byte > 127 else byte
    return total


def naive_decode(words, rows, bits, window):
    """Integer values `[rows][K]` of int32 words `[words, K]`, via strings of bits, one ring at a time."""
    columns = []
    for column in words.T.tolist():
        text = "".join(f"{word & 0xFFFFFFFF:032b}" for word in column)
        values, start = [], 0
        while len(values) < rows:
            ring = text[start : start + int(256 * bits)]
            start += len(ring)
            end = 0
            while end < len(ring):
                end += STRIDES[bits][len(values) % len(STRIDES[bits])]
                values.append(naive_value(int((ring + ring)[end + len(ring) - window : end + len(ring)], 2)))
        columns.append(values[:rows])
    return list(map(list, zip(*columns)))


@pytest.mark.parametrize("window", STREAM_WINDOW_BITS)
def test_every_window_has_the_value_of_the_formula(window):
    assert stream.values(window, "cpu").tolist() == [naive_value(number) for number in range(1 << window)]


@pytest.mark.parametrize("window", STREAM_WINDOW_BITS)
def test_values_are_exact_in_float16_and_near_to_normal(window):
    values = stream.values(window, "cpu").double()
    assert torch.equal(values.half().double(), values)
    assert abs(values.mean()) < 0.05 * DEVIATION
    assert values.std() == pytest.approx(DEVIATION, rel=0.08)
    # The kurtosis of a sum of four uniform variables is 2.7, of a normal variable 3, of a uniform one 1.8.
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean()
    assert 2.5 < kurtosis < 3


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(STREAM_BITS), st.sampled_from(STREAM_WINDOW_BITS), st.integers(1, 600), st.integers(0, 1 << 30)
)
def test_any_words_decode_by_the_description(bits, window, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    words = stream_layout(bits, window).words(rows)
    weight = torch.randint(-(2**31), 2**31, (words, 2), generator=generator).to(torch.int32)
    scale = torch.rand(rows, generator=generator) + 0.1
    expected = torch.tensor(naive_decode(weight, rows, bits, window), dtype=torch.float32) * scale[:, None]
    assert torch.equal(decode({"": weight, "scale": scale}, bits, window), expected)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(STREAM_BITS), st.integers(1, 600), st.integers(0, 1 << 30))
def test_windows_survive_packing(bits, rows, seed):
    weight = normal(rows, 3, seed=seed)
    encoder = codec(bits).unit_encoder(weight)
    windows = encoder.search(weight.T).T
    expected = encoder.scale[:, None] * encoder.values[windows]
    assert torch.equal(decode(encoder.pack(windows), bits), expected)


@pytest.mark.parametrize("bits", STREAM_BITS)
def test_bits_are_counted_as_promised(bits):
    assert codec(bits).bits == bits
    # The scale of a channel costs 32 bits.
    assert counted_bits(codec(bits).specs(4096, 4096), 4096, 4096) == bits + 32 / 4096


@pytest.mark.parametrize(
    "bits, window, limit",
    [
        (2.0, 12, 0.0745),
        (2.0, 16, 0.0705),
        (3.0, 12, 0.0203),
        (4.0, 12, 0.0057),
        (2.25, 12, 0.054),
        (2.5, 12, 0.0385),
    ],
)
def test_squared_error_on_normal_weights(bits, window, limit):
    weight = normal(512, 256)
    chosen = codec(bits, window)
    assert chosen.relative_error(weight, chosen.encode(weight)) < limit


# ------------------------------------------------------------------------------------------------------- search


def total_error(windows, targets, cost, values):
    return (cost.double() * (values.double()[windows] - targets.double()).square()).sum(1)


def test_search_is_the_best_of_all_rings():
    """Rings of eight four-bit symbols whose windows have so few values that all rings can be tried."""
    layout = stream_layout(4.0, 12)
    generator = torch.Generator().manual_seed(0)
    # Values that depend only on the last four bits: each of the eight weights in the ring is then independent.
    values = torch.randn(16, generator=generator).repeat(256)
    targets, cost = normal(5, 8), torch.rand(8, generator=generator)
    found = viterbi.search(targets, cost, values, layout)
    best = (cost * (values[:16, None, None] - targets).square().amin(0)).double().sum(1)
    torch.testing.assert_close(total_error(found, targets, cost, values), best, rtol=1e-5, atol=0)
    # Values that depend on the last eight bits, i.e. on pairs of adjacent symbols: try all rings of symbols 0 and 1.
    symbols = torch.tensor(list(product(range(2), repeat=8)))
    values = torch.randn(4, generator=generator)[torch.arange(4096) & 1 | torch.arange(4096) >> 3 & 2]
    windows = sum(symbols.roll(shift, 1) << (4 * shift) for shift in range(3))
    # Only symbols 0 and 1 differ in value, so these are all possible rings.
    best = torch.stack([total_error(windows, target[None], cost, values).min() for target in targets])
    found = viterbi.search(targets, cost, values, layout)
    torch.testing.assert_close(total_error(found, targets, cost, values), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", STREAM_BITS)
@pytest.mark.parametrize("rows", [128, 512, 640])
def test_compiled_search_finds_what_the_reference_finds(bits, rows):
    pytest.importorskip("numba", reason="Numba, the optional compiler of the search, is not installed")
    layout = stream_layout(bits, 12)
    values = stream.values(12, "cpu").float() / DEVIATION
    targets, cost = normal(3, rows), torch.rand(rows, generator=torch.Generator().manual_seed(1))
    expected = viterbi.reference.search(targets, cost, values, layout)
    found = viterbi.search(targets, cost, values, layout)
    # Codes may differ where two paths cost the same up to float32 rounding.
    torch.testing.assert_close(
        total_error(found, targets, cost, values), total_error(expected, targets, cost, values), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("bits", [2.0, 2.25, 4.0])
def test_windows_continue_each_other_round_the_ring(bits):
    layout = stream_layout(bits, 12)
    strides = torch.tensor(STRIDES[bits] * 256)
    found = viterbi.search(
        normal(4, 384), torch.ones(384), stream.values(12, "cpu").float() / DEVIATION, layout
    ).long()
    for start, stop in ((0, 256), (256, 384)):
        ring = found[:, start:stop]
        assert torch.equal(
            (ring.roll(1, 1) << strides[: stop - start]) % 4096 >> strides[: stop - start],
            ring >> strides[: stop - start],
        )


def paths(errors, targets, values):
    """Least errors of 2-bit paths of 12-bit windows, given `errors` `[n, 1024]` before `targets` `[n, rows]`."""
    for row in range(targets.shape[1]):
        error = (values - targets[:, row, None]).square().view(-1, 1024, 4) + errors[..., None]
        errors = error.view(-1, 4, 1024).amin(1)
    return errors


def test_closing_the_ring_costs_at_most_one_percent():
    layout = stream_layout(2.0, 12)
    values = stream.values(12, "cpu").float() / DEVIATION * 0.97
    targets, cost = normal(64, 256), torch.ones(256)
    closed = total_error(viterbi.search(targets, cost, values, layout), targets, cost, values)
    # A stream of the same weights that need not close.
    assert closed.sum() < 1.01 * paths(torch.zeros(1, 1024), targets.view(1, -1), values).amin()
    # The best of all rings, over every state in which they can begin and end.
    tied = torch.full((1024, 1024), 1e30).fill_diagonal_(0)
    best = [paths(tied, target.expand(1024, -1), values).diagonal().amin() for target in targets[:1]]
    assert closed[:1].sum() < 1.01 * sum(best)


def test_costly_rows_are_served_first():
    """Errors in rows with a large scale cost more, so a ring favors them."""
    weight = normal(256, 64)
    even = codec().relative_error(weight, codec().encode(weight))
    weight[::2] *= 8
    packed = codec().encode(weight)
    error = (decode(packed, 2.0) - weight).square().sum(1) / weight.square().sum(1)
    assert error[::2].mean() < 0.9 * even < even < error[1::2].mean()


@pytest.mark.parametrize("weight", [torch.zeros(20, 16), normal(20, 16) * 1e-30, normal(20, 16) * 1e30])
def test_extreme_rows(weight):
    decoded = decode(codec().encode(weight), 2.0)
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).double().norm() <= 0.3 * weight.double().norm()


def test_encoding_leaves_pytorchs_threads_alone():
    """In a separate process: Numba starts its threads once, and sets the number of OpenMP threads process-wide."""
    code = (
        "import torch\n"
        "from hf_pcdvq.codecs.stream import StreamCodec\n"
        "torch.set_num_threads(1)\n"
        "StreamCodec(128, 0, 2.0, 12).encode(torch.ones(16, 64))\n"
        "raise SystemExit(torch.get_num_threads() != 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_it_says_so(monkeypatch):
    weight = normal(32, 8)
    expected = codec().relative_error(weight, codec().encode(weight))
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(UserWarning, match=r"without Numba \(pip install numba\)"):
        packed = codec().encode(weight)
    assert codec().relative_error(weight, packed) == pytest.approx(expected, rel=1e-5)


def test_the_search_obeys_the_backend(monkeypatch):
    """The reference runs if requested, even with Numba installed, and Triton is never silently replaced."""
    weight = normal(32, 8)
    expected = codec().encode(weight)
    monkeypatch.setitem(sys.modules, "numba", None)
    hf_pcdvq_kernels.set_backend("reference")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packed = codec().encode(weight)
        assert codec().relative_error(weight, packed) == pytest.approx(codec().relative_error(weight, expected), 1e-5)
        hf_pcdvq_kernels.set_backend("triton")
        with pytest.raises(RuntimeError, match="Triton"):
            codec().encode(weight)
    finally:
        hf_pcdvq_kernels.set_backend("auto")


@pytest.mark.parametrize("bits", [2.0, 2.25, 3.0])
def test_slices_of_rows_join_into_the_same_weight(bits, monkeypatch):
    """Encoding and decoding split a weight only between rings."""
    weight, chosen = normal(700, 128), codec(bits, max_block=64)
    tables = chosen.tables(128)
    packed = chosen.encode(weight)
    whole, error = chosen.decode(packed, tables, torch.float32), chosen.relative_error(weight, packed)
    monkeypatch.setattr(base, "_SLICE", {"cpu": 1})
    again = chosen.encode(weight)
    assert torch.equal(again[""][: int(512 * bits / 32)], packed[""][: int(512 * bits / 32)])
    torch.testing.assert_close(chosen.decode(packed, tables, torch.float32), whole)
    assert chosen.relative_error(weight, packed) == pytest.approx(error)


def test_small_rows_beside_large_ones_do_not_get_worse_than_zeros():
    weight = normal(256, 128)
    weight[::16] /= 10
    error = (decode(codec().encode(weight), 2.0) - weight).square().sum(1) / weight.square().sum(1)
    assert error.max() <= 1
