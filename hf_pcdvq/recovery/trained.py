"""What is trained, as one vector: an optimizer, a state on disk and several processes then handle a single tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .student import Student

# A row's factor stays between these, so that no row vanishes and no scale overflows.
FACTORS = (0.25, 4.0)


class TrainedVector:
    """The row factors, norms, biases and other parameters of one dimension of a student as a float32 vector `[P]` of relative changes, 0 at first.

    A parameter is its first value plus its unit times its part of the vector: the unit of factors is 1, that of the
    others their root mean square, so that one learning rate suits all. Only what the file stores is computed with:
    parameters are rounded to the dtype in which they are saved.

    Args:
        student: whose parameters are set by `write`. Only those that are trained require a gradient afterwards.
        stored: dtypes in which the parameters are saved, by name; float32 for others.
    """

    def __init__(self, student: Student, stored: dict[str, torch.dtype]):
        changes = [change for _, layer in student.layers.values() for change in layer.changes().values()]
        factors = {id(change) for change in changes}
        self._parameters: list[nn.Parameter] = []
        self._dtypes: list[torch.dtype] = []
        first, units, factor = [], [], []
        for name, parameter in student.model.named_parameters():
            is_factor = id(parameter) in factors
            chosen = is_factor or (parameter.ndim == 1 and parameter.is_floating_point())
            parameter.requires_grad_(chosen)
            if not chosen:
                continue
            self._parameters.append(parameter)
            self._dtypes.append(stored.get(name, torch.float32))
            value = parameter.detach().float().flatten()
            unit = 1.0 if is_factor else value.square().mean().sqrt().item() or 1.0
            first.append(value)
            units.append(torch.full_like(value, unit))
            factor.append(torch.full_like(value, is_factor, dtype=torch.bool))
        self._first, self._units, self._factor = torch.cat(first), torch.cat(units), torch.cat(factor)
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.values = nn.Parameter(torch.zeros_like(self._first))

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the parameters to what a vector says."""
        parts = (self._first + self._units * values).split(self._sizes)
        for parameter, part, dtype in zip(self._parameters, parts, self._dtypes):
            parameter.copy_(part.to(dtype).view(parameter.shape))

    def reset(self) -> None:
        """Set the parameters to their first values."""
        self.write(torch.zeros_like(self._first))

    @torch.no_grad()
    def limit(self) -> None:
        """Keep the factors in their limits."""
        low, high = (limit - 1 for limit in FACTORS)
        self.values.copy_(torch.where(self._factor, self.values.clamp(low, high), self.values))

    @torch.no_grad()
    def take_gradient(self) -> Tensor:
        """The gradient of the vector, from those of the parameters, which are cleared."""
        parts = []
        for parameter, size in zip(self._parameters, self._sizes):
            gradient = parameter.grad
            parts.append(self._first.new_zeros(size) if gradient is None else gradient.flatten().float())
            parameter.grad = None
        return torch.cat(parts) * self._units
