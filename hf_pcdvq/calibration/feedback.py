"""Error feedback: quantize a weight so that the layer's outputs change least, rather than the weight itself.

A layer whose inputs `x` have the Hessian `H = mean of x x^T` pays `tr(E H E^T)` for an error `E = W - Q` of its weight
`[N, K]`. With the factorization `H = R R^T`, R upper triangular, that is `|E R|^2`, and with the columns cut into units
B (the smallest that the codec encodes by itself) it is the sum over B of

    |(T_B - Q_B) R_BB|^2,    T_B = W_B + (sum over earlier units A of E_A R_AB) R_BB^-1.

So the units are encoded one after the other, each to the codes nearest to its target `T_B`, which carries the errors
made so far: block LDLQ (QuIP, arXiv 2307.13304), which is GPTQ (arXiv 2210.17323) with units of several columns.

Afterwards, sweeps of coordinate descent go over the units again: the others being what they are, the best value of
unit B is `Q_B + (E H)_B H_BB^-1`; it is encoded, and the rows whose loss falls take the new code. The scale of a row is
fitted to its codes in the same metric, `W H Q^T / Q H Q^T`.

Rows do not interact, so layers that share their inputs are stacked and quantized together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.base import UnitEncoder
from .hessian import Hessian
from .settings import Calibration


@dataclass
class _State:
    """A weight on its way. Columns are in the order in which units are encoded, `units` says which unit lies where."""

    encoder: UnitEncoder
    units: list[tuple[int, slice]]
    hessian: Tensor  # [K, K]
    weight: Tensor  # [N, K]
    quantized: Tensor  # [N, K]
    codes: Tensor  # int32 [N, number of units]

    @property
    def error(self) -> Tensor:
        return self.weight - self.quantized


def quantize_with_feedback(
    weight: Tensor, hessian: Hessian, encoder: UnitEncoder, settings: Calibration
) -> tuple[Tensor, Tensor]:
    """Codes and the weight they stand for.

    Args:
        weight: rotated, float32 `[N, K]`.
        hessian: of the rotated inputs.
        encoder: made for the weight; its scales change if `settings.refit`.
        settings: `sweeps`, `refit` and `ordered` count here.

    Returns:
        Codes int32 `[N, units]` for `encoder.pack`, and the quantized weight float32 `[N, K]`.
    """
    order, units = _order(encoder, hessian.matrix, settings.ordered)
    ordered_hessian = hessian.permuted(order)
    weight = weight[:, order]
    codes = weight.new_zeros(len(weight), len(units), dtype=torch.int32)
    state = _State(encoder, units, ordered_hessian.matrix, weight, torch.zeros_like(weight), codes)
    _feed_back(state, ordered_hessian.factor())
    if settings.refit:
        _refit(state)
    for _ in range(settings.sweeps):
        _descend(state)
        if settings.refit:
            _refit(state)
    return state.codes, state.quantized[:, order.argsort()]


def proxy_loss(error: Tensor, weight: Tensor, hessian: Hessian) -> float:
    """`tr(E H E^T) / tr(W H W^T)` of an error and a weight float32 `[N, K]`."""
    total = ((weight @ hessian.matrix) * weight).sum(dtype=torch.float64).item()
    return ((error @ hessian.matrix) * error).sum(dtype=torch.float64).item() / total if total else 0.0


def _order(encoder: UnitEncoder, hessian: Tensor, ordered: bool) -> tuple[Tensor, list[tuple[int, slice]]]:
    """The columns in the order of their units, int64 `[K]`, and for every unit the place of its columns there."""
    numbers = list(range(len(encoder.units)))
    if ordered:
        energy = hessian.diagonal()
        mean = torch.stack([energy[unit].mean() for unit in encoder.units])
        numbers = mean.argsort(descending=True, stable=True).tolist()
    columns = torch.arange(len(hessian), device=hessian.device)
    order = torch.cat([columns[encoder.units[number]] for number in numbers])
    units, start = [], 0
    for number in numbers:
        unit = encoder.units[number]
        stop = start + unit.stop - unit.start
        units.append((number, slice(start, stop)))
        start = stop
    return order, units


def _feed_back(state: _State, factor: Tensor) -> None:
    """Encode every unit to its target."""
    error = torch.zeros_like(state.weight)
    for number, part in state.units:
        past = slice(0, part.start)
        feedback = torch.linalg.solve_triangular(factor[part, part], factor[past, part], upper=True, left=False)
        target = state.weight[:, part] + error[:, past] @ feedback.float()
        state.codes[:, number], state.quantized[:, part] = state.encoder.encode(number, target)
        error[:, part] = state.weight[:, part] - state.quantized[:, part]


def _descend(state: _State) -> None:
    """One sweep of coordinate descent over the units."""
    gradient = state.error @ state.hessian
    for number, part in state.units:
        own = state.hessian[part, part]
        step = torch.linalg.solve(own.double(), gradient[:, part].double(), left=False).float()
        codes, values = state.encoder.encode(number, state.quantized[:, part] + step)
        change = values - state.quantized[:, part]
        # The loss changes by change H change^T - 2 change (E H)^T.
        better = ((change @ own - 2 * gradient[:, part]) * change).sum(1) < 0
        change *= better[:, None]
        state.codes[:, number] = torch.where(better, codes, state.codes[:, number])
        state.quantized[:, part] += change
        gradient.addmm_(change, state.hessian[part], alpha=-1)


def _refit(state: _State) -> None:
    """Fit the scale of every row in the metric of the Hessian. A row that would turn to zero or flip stays."""
    product = state.quantized @ state.hessian
    own = (product * state.quantized).sum(1)
    factor = (product * state.weight).sum(1) / torch.where(own > 0, own, 1)
    factor = torch.where((own > 0) & (factor > 0), factor, 1)
    state.encoder.rescale(factor)
    state.quantized *= factor[:, None]
