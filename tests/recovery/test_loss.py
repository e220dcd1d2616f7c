"""The loss and the factor of a row, against what PyTorch computes."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, linear

from hf_pcdvq.recovery import loss
from hf_pcdvq.recovery.settings import Recovery
from hf_pcdvq.recovery.student import _ScaledRows
from hf_pcdvq.recovery.training import learning_rate


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_divergence_and_its_derivative_are_those_of_the_whole_vocabulary(monkeypatch, rows):
    monkeypatch.setattr(loss, "_SLICE_BYTES", rows * 4 * 50)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, 50, generator=generator).mul(3).requires_grad_()
    teacher = torch.randn(2, 9, 50, generator=generator) * 3
    expected = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 18, student)
    found = loss.divergence(student, teacher)
    torch.testing.assert_close(found, expected)
    (found / 18).backward()
    torch.testing.assert_close(student.grad, wanted)


def test_tokens_that_a_model_rules_out_cost_nothing():
    student, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[0.0, 0.0, -torch.inf, 0.0]])
    found = loss.divergence(student, teacher)
    assert found.item() == pytest.approx(math.log(4 / 3))
    found.backward()
    assert student.grad.tolist()[0] == pytest.approx([-1 / 12, -1 / 12, 1 / 4, -1 / 12])
    both = torch.tensor([[0.0, 1.0, -torch.inf, 0.0]])
    assert loss.divergence(both, both).item() == 0


def test_a_row_factor_has_the_derivatives_of_the_product():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 8), (5, 8)))
    change = torch.randn(5, generator=generator, dtype=torch.float64)
    x.requires_grad_(), change.requires_grad_()
    torch.testing.assert_close(_ScaledRows.apply(x, weight, change), linear(x, (1 + change)[:, None] * weight))
    expected = torch.autograd.grad(linear(x, (1 + change)[:, None] * weight).square().sum(), (x, change))
    found = torch.autograd.grad(_ScaledRows.apply(x, weight, change).square().sum(), (x, change))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_the_learning_rate_rises_to_the_largest_and_falls_to_a_tenth():
    settings = Recovery(steps=100, learning_rate=1e-3, warmup=0.1)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.55e-3, rel=1e-2)
