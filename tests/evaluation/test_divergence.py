"""The loss that models are trained with towards their original, against what PyTorch computes."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from hf_pcdvq.evaluation import divergence


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_divergence_and_its_derivative_are_those_of_the_whole_vocabulary(monkeypatch, rows):
    monkeypatch.setattr(divergence, "_SLICE_BYTES", rows * 4 * 50)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, 50, generator=generator).mul(3).requires_grad_()
    teacher = torch.randn(2, 9, 50, generator=generator) * 3
    expected = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 18, student)
    found = divergence.divergence(student, teacher)
    torch.testing.assert_close(found, expected)
    (found / 18).backward()
    torch.testing.assert_close(student.grad, wanted)


def test_tokens_that_a_model_rules_out_cost_nothing():
    student, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[0.0, 0.0, -torch.inf, 0.0]])
    found = divergence.divergence(student, teacher)
    assert found.item() == pytest.approx(math.log(4 / 3))
    found.backward()
    assert student.grad.tolist()[0] == pytest.approx([-1 / 12, -1 / 12, 1 / 4, -1 / 12])
    both = torch.tensor([[0.0, 1.0, -torch.inf, 0.0]])
    assert divergence.divergence(both, both).item() == 0
