"""Moments of inputs, and the rules for Hessians that cannot be used unchanged."""

import pytest
import torch

from hf_pcdvq.calibration.hessian import InputMoments, UnusableHessian, prepare_hessian
from hf_pcdvq.calibration.inputs import OriginalInputs
from hf_pcdvq.codecs import hadamard

CPU = torch.device("cpu")


def moments_of(*parts):
    moments = InputMoments(parts[0].shape[1], CPU)
    for part in parts:
        moments.add(part)
    return moments


def tokens(count, features, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [8, 24, 57])
def test_hessian_is_the_mean_over_all_windows(features):
    x = tokens(300, features)
    hessian = prepare_hessian(moments_of(x[:100], x[100:]), 0.01, None)
    mean = x.double().T @ x.double() / 300
    expected = mean + 0.01 * mean.diagonal().mean() * torch.eye(features)
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-6)
    assert (hessian.tokens, hessian.dead, hessian.note) == (300, 0, None)
    factor = hessian.factor()
    torch.testing.assert_close(factor @ factor.T, hessian.matrix.double(), rtol=1e-10, atol=1e-10)
    assert torch.equal(factor, factor.triu())


def test_rotated_hessian_is_that_of_rotated_inputs():
    x, signs = tokens(300, 24), hadamard.signs(8, seed=3)
    rotated = prepare_hessian(moments_of(x), 0.01, signs)
    expected = prepare_hessian(moments_of(hadamard.rotate(x, signs)), 0.01, None)
    torch.testing.assert_close(rotated.matrix, expected.matrix, rtol=1e-4, atol=1e-5)


def test_cross_moment_makes_up_for_changed_inputs():
    # If the inputs are halved, twice the weight gives the same outputs.
    original = tokens(200, 16)
    moments = InputMoments(16, CPU)
    moments.add(original[None] / 2, original[None])
    hessian = prepare_hessian(moments, 1e-8, None)
    weight = tokens(5, 16, seed=1)
    corrected = weight + hessian.solve(weight @ moments.cross / moments.tokens)
    torch.testing.assert_close(corrected, 2 * weight, rtol=1e-3, atol=1e-3)


def test_float16_inputs_do_not_overflow_in_the_sums():
    x = torch.full((1, 100, 8), 50.0, dtype=torch.float16)
    moments = InputMoments(8, CPU)
    moments.add(x, 2 * x)
    assert torch.equal(moments.cross, torch.full((8, 8), 250_000.0))


def test_dead_inputs_are_counted_and_do_no_harm():
    x = tokens(300, 16)
    x[:, [3, 7]] = 0
    hessian = prepare_hessian(moments_of(x), 0.01, None)
    assert hessian.dead == 2
    assert hessian.matrix[3, 3] > 0


def test_few_tokens_raise_damping_and_say_so():
    hessian = prepare_hessian(moments_of(tokens(4, 16)), 0.01, None)
    assert hessian.damp_percent == pytest.approx(0.04)
    assert hessian.note == "only 4 tokens for 16 inputs: damping raised to 0.04"


def test_singular_hessian_raises_damping_and_says_so():
    x = tokens(300, 16) * torch.logspace(0, 6, 16)  # more than the smallest damping can handle in float32
    x[:, 1:] = x[:, :1] * torch.arange(1, 16)
    hessian = prepare_hessian(moments_of(x), 1e-8, None)
    assert hessian.damp_percent > 1e-8
    assert "singular: damping raised" in hessian.note
    assert torch.isfinite(hessian.factor()).all()


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        (None, "no token reached it"),
        (InputMoments(8, CPU), "no token reached it"),
        (moments_of(torch.full((20, 8), torch.inf)), "not finite"),
        (moments_of(torch.full((20, 8), torch.nan)), "not finite"),
        (moments_of(torch.zeros(20, 8)), "singular"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(moments, reason):
    with pytest.raises(UnusableHessian, match=reason):
        prepare_hessian(moments, 0.01, None)


def test_tokens_that_cannot_be_paired_are_not_compared():
    moments = InputMoments(8, CPU)
    moments.add(tokens(2, 8), tokens(2, 8))  # an expert's tokens, [T, K]: may differ in the original model
    assert (moments.tokens, moments.cross) == (2, None)


def test_layers_with_one_input_are_a_group_and_idle_ones_are_found():
    kept = {}
    inputs = OriginalInputs(["q", "k", "o", "expert", "idle"], kept)
    for seed in range(2):
        x = tokens(6, 8, seed)[None]
        window = {"q": x, "k": x, "o": x.clone()}
        inputs.add(seed, window if seed == 0 else {**window, "expert": x[0, :2]})
    assert inputs.groups() == [["q", "k"], ["o"], ["expert"]]
    assert inputs.idle() == ["idle"]
    assert list(kept) == [(0, "q"), (0, "o"), (1, "q"), (1, "o"), (1, "expert")]
