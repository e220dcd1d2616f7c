"""KL(teacher || student) over the whole vocabulary, computed in slices: no float32 copy of all logits is ever made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLICE_BYTES = 32 << 20  # of one float32 temporary; there are four at a time


class NotFiniteError(RuntimeError):
    """The loss of a training, or a gradient, is infinite or NaN."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats, summed over the predictions; differentiable in `student`.

    Args:
        student, teacher: logits `[..., vocabulary]` in any floating-point dtypes, on one device.

    Returns:
        A float32 scalar.
    """
    vocabulary = student.shape[-1]
    return _Divergence.apply(student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary))


class _Divergence(torch.autograd.Function):
    """Its derivative, softmax(student) - softmax(teacher), is computed with the value, slice by slice."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        derivative = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = max(1, _SLICE_BYTES // (4 * student.shape[-1]))
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), rows):
            log_q = student[start : start + rows].float().log_softmax(-1)
            log_p = teacher[start : start + rows].float().log_softmax(-1)
            p = log_p.exp()
            # Tokens of probability 0, whose logits a model may set to minus infinity, contribute nothing.
            total += log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum()
            if derivative is not None:
                torch.sub(log_q.exp_(), p, out=log_q)
                derivative[start : start + rows] = log_q
        if derivative is not None:
            ctx.save_for_backward(derivative)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * gradient.to(derivative.dtype), None
