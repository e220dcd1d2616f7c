"""The factor of a row against what PyTorch computes, and the learning rate."""

import pytest
import torch
from torch.nn.functional import linear

from hf_pcdvq.recovery.settings import Recovery
from hf_pcdvq.recovery.student import _ScaledRows
from hf_pcdvq.recovery.training import learning_rate


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
