"""The student: a packed model whose packed modules stand aside for dense decoded ones while it is trained.

Their weights are frozen. What is trained of them is one factor per output channel, `1 + change`, which multiplies the
scale of the row in the end. As a factor of the output it needs no gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..modules import STACKS, PackedModule, QuantEmbedding, QuantExperts, QuantLinear, packed_modules
from ..modules.experts import sum_over_experts
from ..modules.tied import tie_dense


class _ScaledRows(torch.autograd.Function):
    """`(x W^T) * (1 + change)`. In 16-bit floats the change, which is small, is exact to far finer steps than the
    factor would be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, change: Tensor) -> Tensor:
        out = linear(x, weight)
        change = change.to(out.dtype)
        ctx.save_for_backward(weight, change, out)
        return torch.addcmul(out, out, change)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor]:
        weight, change, out = ctx.saved_tensors
        by_row = (gradient * out).flatten(0, -2).sum(0, dtype=torch.float32)
        by_input = torch.addcmul(gradient, gradient, change) @ weight if ctx.needs_input_grad[0] else None
        return by_input, None, by_row


class StudentLinear(nn.Module):
    """A linear layer with a frozen decoded weight.

    Attributes:
        weight: `[N, K]` in the dtype in which the student computes; no parameter, since it is never trained.
        change: float32 `[N]`.
    """

    def __init__(self, packed: QuantLinear, dtype: torch.dtype):
        super().__init__()
        self.weight = packed.decoded("weight", dtype)
        self.change = nn.Parameter(self.weight.new_zeros(len(self.weight), dtype=torch.float32))
        self.bias = packed.bias  # the same parameter, which is trained in place

    def forward(self, x: Tensor) -> Tensor:
        out = _ScaledRows.apply(x, self.weight, self.change)
        return out if self.bias is None else out + self.bias

    def changes(self) -> dict[str, nn.Parameter]:
        """By the name of the packed parameter, the change of its rows."""
        return {"weight": self.change}


class StudentExperts(nn.Module):
    """Fused experts with frozen decoded weights, and a change for every row of every expert, float32 `[E, N]`."""

    def __init__(self, packed: QuantExperts, dtype: torch.dtype):
        super().__init__()
        self._packed = (packed,)  # not as a child, whose parameters would be those of the student
        self._weights = {name: packed.decoded(name, dtype) for name in STACKS}
        self._changes = nn.ParameterDict(
            {
                name: nn.Parameter(weight.new_zeros(weight.shape[:2], dtype=torch.float32))
                for name, weight in self._weights.items()
            }
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        number = len(self._weights["down_proj"])
        return sum_over_experts(hidden_states, top_k_index, top_k_weights, number, self._run_expert)

    def _run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        gate_up = self._multiply("gate_up_proj", expert, hidden_states)
        return self._multiply("down_proj", expert, self._packed[0].gate(gate_up))

    def _multiply(self, stack: str, expert: int, x: Tensor) -> Tensor:
        return _ScaledRows.apply(x, self._weights[stack][expert], self._changes[stack][expert])

    def changes(self) -> dict[str, nn.Parameter]:
        return dict(self._changes.items())


_STUDENTS: dict[type[PackedModule], Any] = {QuantLinear: StudentLinear, QuantExperts: StudentExperts}


def _frozen(packed: QuantEmbedding | QuantLinear, dtype: torch.dtype) -> nn.Module:
    """A dense module with the same bias, which is trained in place."""
    dense = packed.dequantize(dtype)
    if getattr(packed, "bias", None) is not None:
        dense.bias = packed.bias
    return dense


class Student:
    """A packed model in its dense form for training.

    Attributes:
        model: the model itself.
        layers: by name, the packed modules and those that stand in for them.
        frozen: likewise packed embeddings and a packed output head, of which nothing but a bias is trained.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        self.layers: dict[str, tuple[PackedModule, Any]] = {}
        self.frozen: dict[str, tuple[PackedModule, nn.Module]] = {}
        head = model.get_output_embeddings()
        for name, packed in packed_modules(model).items():
            if isinstance(packed, QuantEmbedding) or packed is head:
                self.frozen[name] = packed, _frozen(packed, dtype)
            else:
                self.layers[name] = packed, _STUDENTS[type(packed)](packed, dtype)

    @torch.no_grad()
    def keep_changes(self) -> None:
        """Multiply the scales of the packed modules by the factors, each rounded once. An error leaves all of them as
        they were."""
        scaled = [
            (packed, parameter, packed.codec.with_factor(packed.packed_tensors(parameter), 1 + change.double()))
            for packed, standing_in in self.layers.values()
            for parameter, change in standing_in.changes().items()
        ]
        for packed, parameter, tensors in scaled:
            packed.set_packed(parameter, tensors)


@contextmanager
def as_student(model: nn.Module, dtype: torch.dtype) -> Iterator[Student]:
    """Let dense modules stand in for the packed ones; exiting puts those back, with their scales as they were unless
    `keep_changes` was called."""
    student = Student(model, dtype)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, (_, standing_in) in (student.layers | student.frozen).items():
            model.set_submodule(name, standing_in)
        tie_dense(model, {name: packed for name, (packed, _) in student.frozen.items()})
        yield student
    finally:
        for name, (packed, _) in (student.layers | student.frozen).items():
            model.set_submodule(name, packed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
            parameter.grad = None
