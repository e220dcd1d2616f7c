"""Error feedback against its definition, and its gain over rounding."""

import pytest
import torch

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig
from hf_pcdvq.calibration.feedback import quantize_with_feedback
from hf_pcdvq.calibration.hessian import Hessian
from hf_pcdvq.codecs.base import UnitEncoder

CODECS = {
    "pcdvq-2.0": PcdvqConfig(bits=2.0).codec,
    "pcdvq-2.25 projection": PcdvqConfig(bits=2.25, magnitude="projection").codec,
    "ccq-2.75": CcqConfig(layout="2.75").codec,
    "ccq-2.5": CcqConfig(layout="2.5").codec,
    "ccq-2.0625": CcqConfig(layout="2.0625").codec,
    "stream-2.0": CcqConfig(layout="stream").codec,
    "stream-2.5": CcqConfig(layout="stream", bits=2.5).codec,
}
PLAIN = Calibration(desc_act=False, sweeps=0, refit=False)


def hessian_of(matrix):
    return Hessian(matrix, tokens=1, dead=0, damp_percent=0.0, note=None)


def problem(rows=96, columns=128, seed=0):
    """A weight, and the Hessian of inputs that are correlated and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.linspace(0.2, 2, columns)
    matrix = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    return weight, hessian_of(matrix)


class Rounding(UnitEncoder):
    """Rounds to integers, in units of uneven width, and records the targets that it is given."""

    def __init__(self, widths, rows):
        self.rows = rows
        ends = torch.tensor(widths).cumsum(0).tolist()
        self.units = [slice(end - width, end) for end, width in zip(ends, widths)]
        self.targets = {}

    def encode(self, unit, target):
        self.targets[unit] = target
        return torch.zeros(len(target), dtype=torch.int32), target.round()

    def rescale(self, factor):
        raise AssertionError("refit is off")

    def pack(self, codes):
        return {}


def test_target_of_a_unit_is_the_best_there_is_given_the_errors_made():
    # Given the errors E_A of the finished columns, the cheapest errors for all others L are -E_A H_AL H_LL^-1.
    weight, hessian = problem(rows=5, columns=12)
    weight = weight * 3
    encoder = Rounding([3, 4, 1, 4], rows=5)
    _, quantized = next(quantize_with_feedback([(weight, [encoder])], hessian, PLAIN))
    matrix, error = hessian.matrix.double(), (weight - quantized).double()
    for number, unit in enumerate(encoder.units):
        left = torch.linalg.inv(matrix[unit.start :, unit.start :])
        best = error[:, : unit.start] @ matrix[: unit.start, unit.start :] @ left
        expected = weight[:, unit].double() + best[:, : unit.stop - unit.start]
        torch.testing.assert_close(encoder.targets[number].double(), expected, rtol=1e-4, atol=1e-5)


def test_ordered_encodes_units_of_most_energy_first():
    weight, _ = problem(rows=5, columns=12)
    energy = torch.tensor([1, 1, 1, 5, 5, 5, 5, 9, 2, 2, 2, 2]).float()
    encoder = Rounding([3, 4, 1, 4], rows=5)
    settings = Calibration(desc_act=True, sweeps=0, refit=False)
    next(quantize_with_feedback([(weight, [encoder])], hessian_of(energy.diag()), settings))
    assert list(encoder.targets) == [2, 1, 3, 0]


@pytest.mark.parametrize("name", CODECS)
def test_without_correlations_it_is_rounding_to_the_nearest(name):
    codec = CODECS[name]
    weight, _ = problem()
    encoder = codec.unit_encoder(weight)
    codes, _ = next(quantize_with_feedback([(weight, [encoder])], hessian_of(torch.eye(128)), PLAIN))
    packed, expected = encoder.pack(codes), codec.encode_rotated(weight)
    assert packed.keys() == expected.keys()
    for suffix in expected.keys() - (
        {"scale"} if name.startswith("stream") else set()
    ):  # rounding satisfies that one, too
        assert torch.equal(packed[suffix], expected[suffix]), suffix


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_packed_codes_stand_for_the_weight_that_is_returned(name, desc_act):
    codec = CODECS[name]
    weight, hessian = problem()
    encoder = codec.unit_encoder(weight)
    codes, quantized = next(
        quantize_with_feedback([(weight, [encoder])], hessian, Calibration(desc_act=desc_act, sweeps=2))
    )
    decoded = codec.decode_rotated(encoder.pack(codes), codec.tables(128), torch.float32)
    # Sweeps add differences of decoded values, so they agree only up to float32 rounding.
    assert (decoded - quantized).norm() <= 1e-5 * quantized.norm()


@pytest.mark.parametrize("name", CODECS)
def test_every_step_lowers_the_loss(name):
    codec = CODECS[name]
    weight, hessian = problem()
    rounded = codec.decode_rotated(codec.encode_rotated(weight), codec.tables(128), torch.float32)
    losses = [hessian.loss(weight - rounded).sum()]
    for settings in (
        PLAIN,
        Calibration(desc_act=False, sweeps=0),
        Calibration(desc_act=False, sweeps=1),
        Calibration(desc_act=False, sweeps=3),
    ):
        _, quantized = next(quantize_with_feedback([(weight, [codec.unit_encoder(weight)])], hessian, settings))
        losses.append(hessian.loss(weight - quantized).sum())
    assert losses[1] < 0.8 * losses[0]
    assert losses[1] >= losses[2] > losses[3] > losses[4]


@pytest.mark.parametrize("name", ["ccq-2.5", "stream-2.25"])
def test_stacked_layers_are_quantized_as_if_alone(name):
    codec = CcqConfig(layout="stream", bits=2.25).codec if name.startswith("stream") else CODECS[name]
    weight, hessian = problem(rows=300)
    parts = weight.split([44, 256])
    encoders = [codec.unit_encoder(part) for part in parts]
    codes, _ = next(quantize_with_feedback([(weight, encoders)], hessian, Calibration()))
    for part, encoder, rows in zip(parts, encoders, codes.split([44, 256])):
        alone = codec.unit_encoder(part)
        expected, _ = next(quantize_with_feedback([(part, [alone])], hessian, Calibration()))
        stacked = codec.decode_rotated(encoder.pack(rows), {}, torch.float32)
        single = codec.decode_rotated(alone.pack(expected), {}, torch.float32)
        # Matrix products with different numbers of rows may round differently and flip a tied code.
        assert (stacked - single).norm() <= 0.02 * single.norm()


def test_row_of_zeros_stays_zero():
    for codec in CODECS.values():
        weight, hessian = problem()
        weight[3] = 0
        _, quantized = next(quantize_with_feedback([(weight, [codec.unit_encoder(weight)])], hessian, Calibration()))
        assert torch.isfinite(quantized).all()
        assert (quantized[3] == 0).all()
