"""Quantizing weights with a common input: correction of the target, and the contents of the records."""

import pytest
import torch

from hf_pcdvq import Calibration, PcdvqConfig
from hf_pcdvq.calibration.hessian import InputMoments, prepare_hessian
from hf_pcdvq.calibration.layers import output_changes, predicted_share, quantize_layers

CODEC = PcdvqConfig().codec


def weights_and_moments():
    """The weights of two layers whose inputs are half of those in the original model."""
    torch.manual_seed(0)
    weights = {name: torch.randn(size, 64) / 8 for name, size in (("gate", 24), ("up", 40))}
    original = torch.randn(1, 512, 64)
    moments = InputMoments(64, torch.device("cpu"))
    moments.add(original / 2, original)
    return weights, moments


@pytest.mark.parametrize(("correction", "expected"), [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)])
def test_correction_makes_up_for_its_share_of_what_the_inputs_lost(correction, expected):
    weights, moments = weights_and_moments()
    packed, _ = quantize_layers(weights, moments, CODEC, Calibration(correction=correction, damp_percent=1e-6))
    for name, weight in weights.items():
        decoded = CODEC.decode(packed[name], CODEC.tables(64), torch.float32)
        factor = (decoded * weight).sum() / weight.square().sum()
        # Quantizing to conditional means shrinks a weight by the squared error of the codes, 0.068.
        assert factor.item() == pytest.approx(expected * (1 - 0.068), rel=0.03)


def test_records_belong_to_the_layers_they_name():
    weights, moments = weights_and_moments()
    _, records = quantize_layers(weights, moments, CODEC, Calibration(correction=0.0))
    assert [(record.name, record.out_features, record.in_features) for record in records] == [
        ("gate", 24, 64),
        ("up", 40, 64),
    ]
    for record in records:
        assert record.tokens == 512
        assert 8 < record.snr < 14  # squared error 0.07 on normal weights is 11.5 dB


def test_own_share_is_how_much_of_the_change_in_outputs_the_inputs_predict():
    # Half of the change is a linear function of the inputs, half is noise; least squares over the tokens says how much.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4096, 64, generator=generator)
    change = inputs @ torch.randn(64, 64, generator=generator) / 80 + 0.1 * torch.randn(
        inputs.shape, generator=generator
    )
    weights = {name: torch.randn(size, 64, generator=generator) / 8 for name, size in (("gate", 24), ("up", 40))}
    moments = InputMoments(64, torch.device("cpu"), with_change=True)
    moments.add(inputs, inputs + change)
    settings = Calibration(correction="own", damp_percent=1e-6)
    packed, _ = quantize_layers(weights, moments, CODEC, settings)
    for name, weight in weights.items():
        lost = change[0] @ weight.T
        found = torch.linalg.lstsq(inputs[0], lost).solution
        share = 1 - (lost - inputs[0] @ found).square().sum() / lost.square().sum()
        assert 0.3 < share < 0.9
        missing = weight @ moments.cross / moments.tokens
        step = prepare_hessian(moments, 1e-8, None).solve(missing)
        predicted = predicted_share(output_changes(weight, missing, step, moments))
        assert predicted.item() == pytest.approx(share.item(), rel=1e-3)
        fixed = Calibration(correction=share.item(), damp_percent=1e-6)
        alone, _ = quantize_layers({name: weight}, moments, CODEC, fixed)
        own, same = (CODEC.decode(tensors[name], CODEC.tables(64), torch.float32) for tensors in (packed, alone))
        assert (own - same).norm() < 0.05 * own.norm()  # a few codes are decided by the last digits


def test_own_share_of_inputs_that_have_not_changed_is_none():
    weights, _ = weights_and_moments()
    inputs = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(64, torch.device("cpu"), with_change=True)
    moments.add(inputs, inputs)
    found, expected = (
        quantize_layers(weights, moments, CODEC, Calibration(correction=correction))[0] for correction in ("own", 0.0)
    )
    assert all(torch.equal(found[name][key], expected[name][key]) for name in weights for key in found[name])


def guided(scale, names=("gate", "up")):
    """Weights, and moments with sensitivities of two groups, of which those of the second are multiplied by `scale`."""
    weights, _ = weights_and_moments()
    inputs = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(64, torch.device("cpu"))
    moments.add(inputs, inputs, {name: torch.stack([torch.ones(512), scale * torch.ones(512)], 1) for name in names})
    return weights, moments


def test_groups_without_any_sensitivity_leave_the_hessian_of_all_and_are_noted():
    weights, moments = guided(scale=0.0)
    settings = Calibration(correction=0.0, fisher_groups=2)
    found, records = quantize_layers(weights, moments, CODEC, settings)
    moments.guided.clear()
    expected, _ = quantize_layers(weights, moments, CODEC, settings)
    assert all(torch.equal(found[name][key], expected[name][key]) for name in weights for key in found[name])
    for record in records:
        assert "not weighed by sensitivity (group 2 of 2 of gate: its Hessian is singular)" in record.note


def test_layers_whose_sensitivity_is_not_known_are_noted():
    weights, moments = guided(scale=1.0, names=("gate",))
    _, records = quantize_layers(weights, moments, CODEC, Calibration(fisher_groups=2))
    assert all(record.note == "not weighed by sensitivity (that to up is not known)" for record in records)
    _, records = quantize_layers(weights, moments, CODEC, Calibration())
    assert all(record.note is None for record in records)


def test_raised_damping_of_a_group_is_noted():
    weights, moments = guided(scale=1.0)
    moments.guided["up"][1] -= (
        0.5 * torch.eye(64) * moments.guided["up"][1].diagonal().mean()
    )  # not positive definite
    _, records = quantize_layers(weights, moments, CODEC, Calibration(correction=0.0, fisher_groups=2))
    gate, up = records
    assert gate.note is None
    assert up.note.startswith("group 2 of 2 of up: its Hessian is singular: damping raised to")
