"""Quantizing weights with a common input: correction of the target, and the contents of the records."""

import pytest
import torch

from hf_pcdvq import Calibration, PcdvqConfig
from hf_pcdvq.calibration.hessian import InputMoments
from hf_pcdvq.calibration.layers import quantize_layers

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
