"""Error feedback: quantize a weight so that the layer's outputs, rather than the weight itself, change least.

For a layer whose inputs `x` have the Hessian `H = mean of x x^T`, an error `E = W - Q` of its weight `[N, K]` has the
loss `tr(E H E^T)`. With the factorization `H = R R^T`, R upper triangular, that is `|E R|^2`, and with the columns
split into units B (the smallest slices that the codec can encode) it is the sum over B of

    |(T_B - Q_B) R_BB|^2,    T_B = W_B + (sum over earlier units A of E_A R_AB) R_BB^-1.

So the units are encoded one after the other, each to the codes nearest to its target `T_B`, which accounts for the
errors made so far: block LDLQ (QuIP, arXiv 2307.13304), that is, GPTQ (arXiv 2210.17323) with units of several
columns.

Sweeps of coordinate descent then visit the units again: with all others fixed, the best value of unit B is
`Q_B + (E H)_B H_BB^-1`; it is encoded, and rows whose loss decreases take the new code. The scale of a row is fitted
to its codes in the same metric, `W H Q^T / Q H Q^T`.

Rows do not interact, so layers that share their inputs are stacked and quantized together, and groups of rows may have
Hessians of their own.

Both passes work in panels of `_PANEL` columns: within a panel every unit sees the effect of those before it at once;
the effect of a whole panel on the columns after it is one large matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.base import UnitEncoder
from .hessian import GroupedHessian, Hessian
from .settings import Calibration

_PANEL = 128


@dataclass
class _State:
    """A weight while it is quantized, its columns in the order in which units are encoded."""

    encoders: Sequence[UnitEncoder]  # of the layers that are stacked
    units: list[tuple[int, slice]]  # numbers of the units in that order, and their columns
    hessian: Hessian | GroupedHessian
    weight: Tensor  # [N, K]
    quantized: Tensor  # [N, K]
    codes: Tensor  # int32 [N, number of units]

    @property
    def error(self) -> Tensor:
        return self.weight - self.quantized

    @property
    def sizes(self) -> list[int]:
        """Rows of the stacked layers."""
        return [encoder.rows for encoder in self.encoders]

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        parts = [encoder.encode(unit, rows) for encoder, rows in zip(self.encoders, target.split(self.sizes))]
        return _joined([codes for codes, _ in parts]), _joined([values for _, values in parts])

    def improved(self, change: Tensor) -> Tensor:
        parts = zip(self.encoders, change.split(self.sizes))
        return _joined([encoder.improved(part) for encoder, part in parts])

    def rescale(self, factor: Tensor) -> None:
        for encoder, part in zip(self.encoders, factor.split(self.sizes)):
            encoder.rescale(part)
        self.quantized *= factor[:, None]

    def panels(self) -> Iterator[tuple[int, int, list[tuple[int, slice]]]]:
        """Start, end and units of every panel of columns."""
        panel: list[tuple[int, slice]] = []
        for unit in self.units:
            panel.append(unit)
            if unit[1].stop - panel[0][1].start >= _PANEL or unit is self.units[-1]:
                yield panel[0][1].start, unit[1].stop, panel
                panel = []


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def quantize_with_feedback(
    parts: Iterable[tuple[Tensor, Sequence[UnitEncoder]]], hessian: Hessian | GroupedHessian, settings: Calibration
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes, and the weight that they decode to, of every part.

    Args:
        parts: rotated weights float32 `[N, K]`, each with the encoders of the layers whose rows are stacked in it; with
            `settings.refit` their scales change.
        hessian: of the rotated inputs, one for all rows or one for every group of the rows of the only part.
        settings: of which `sweeps`, `refit` and `desc_act` are used here.

    Returns:
        Codes int32 `[N, units]`, whose rows each encoder can pack, and the quantized weight float32 `[N, K]`.
    """
    ordered: Hessian | GroupedHessian | None = None
    for weight, encoders in parts:
        if ordered is None:  # the same for all of them
            order, units = _order(encoders[0], hessian.energy, settings.desc_act)
            ordered = hessian.permuted(order)
            factor = ordered.factor()
        weight = weight[:, order]
        codes = weight.new_zeros(len(weight), len(units), dtype=torch.int32)
        state = _State(encoders, units, ordered, weight, torch.zeros_like(weight), codes)
        _feed_back(state, factor)
        if settings.refit:
            _refit(state)
        for _ in range(settings.sweeps):
            _descend(state)
            if settings.refit:
                _refit(state)
        yield state.codes, state.quantized[:, order.argsort()]


def _order(encoder: UnitEncoder, energy: Tensor, desc_act: bool) -> tuple[Tensor, list[tuple[int, slice]]]:
    """The order of the columns, int64 `[K]`, and in that order every unit's number with the slice of its columns."""
    numbers = list(range(len(encoder.units)))
    if desc_act:
        mean = torch.stack([energy[unit].mean() for unit in encoder.units])
        numbers = mean.argsort(descending=True, stable=True).tolist()
    columns = torch.arange(len(energy), device=energy.device)
    order = torch.cat([columns[encoder.units[number]] for number in numbers])
    units, start = [], 0
    for number in numbers:
        unit = encoder.units[number]
        stop = start + unit.stop - unit.start
        units.append((number, slice(start, stop)))
        start = stop
    return order, units


def _feed_back(state: _State, factor: Tensor) -> None:
    """Encode every unit to its target, given the factor R."""
    product = state.hessian.product
    error = torch.zeros_like(state.weight)
    for start, stop, units in state.panels():
        shares = _shares(factor, [part for _, part in units])
        target = state.weight[:, start:stop] + product(error[:, :start], shares[..., :start, :])
        for number, part in units:
            done, own = slice(start, part.start), slice(part.start - start, part.stop - start)
            wanted = target[:, own] + product(error[:, done], shares[..., done, own])
            state.codes[:, number], state.quantized[:, part] = state.encode(number, wanted)
            error[:, part] = state.weight[:, part] - state.quantized[:, part]


def _shares(factor: Tensor, parts: list[slice]) -> Tensor:
    """`R_AB R_BB^-1` of a panel's units B and all columns A up to its end, float32 `[..., end, columns of the panel]`.

    All at once: on an accelerator, a solver call for every unit would take longer than to encode it.
    """
    start, stop = parts[0].start, parts[-1].stop
    shares = factor.new_empty(*factor.shape[:-2], stop, stop - start, dtype=torch.float32)
    for columns in _by_width(parts, factor.device):
        above = factor[..., :stop, columns].transpose(-3, -2)  # [..., units, end, width]
        own = factor[..., columns[:, :, None], columns[:, None, :]]
        solved = torch.linalg.solve_triangular(own, above, upper=True, left=False)
        shares[..., columns - start] = solved.transpose(-3, -2).float()
    return shares


def _inverses(matrix: Tensor, parts: list[slice]) -> list[Tensor]:
    """`H_BB^-1` of a panel's units B, float64 `[..., width, width]` each."""
    found: dict[int, Tensor] = {}
    for columns in _by_width(parts, matrix.device):
        inverse = torch.linalg.inv(matrix[..., columns[:, :, None], columns[:, None, :]].double())
        starts = [part.start for part in parts if part.stop - part.start == columns.shape[1]]
        found.update(zip(starts, inverse.unbind(-3)))
    return [found[part.start] for part in parts]


def _by_width(parts: list[slice], device: torch.device) -> Iterator[Tensor]:
    """The columns of slices, int64 `[n, width]` for every width that occurs."""
    for width in sorted({part.stop - part.start for part in parts}):
        starts = [part.start for part in parts if part.stop - part.start == width]
        yield torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)


def _descend(state: _State) -> None:
    """One sweep of coordinate descent over the units."""
    hessian, product = state.hessian.matrix, state.hessian.product
    gradient = product(state.error, hessian)
    for start, stop, units in state.panels():
        before = state.quantized[:, start:stop].clone()
        inverses = _inverses(hessian, [part for _, part in units])
        for (number, part), inverse in zip(units, inverses):
            step = product(gradient[:, part].double(), inverse).float()
            codes, values = state.encode(number, state.quantized[:, part] + step)
            change = values - state.quantized[:, part]
            # The loss changes by change H change^T - 2 change (E H)^T.
            own = hessian[..., part, part]
            better = state.improved(((product(change, own) - 2 * gradient[:, part]) * change).sum(1))
            change *= better[:, None]
            state.codes[:, number] = torch.where(better, codes, state.codes[:, number])
            state.quantized[:, part] += change
            gradient[:, start:stop] -= product(change, hessian[..., part, start:stop])
        total = state.quantized[:, start:stop] - before
        gradient[:, stop:] -= product(total, hessian[..., start:stop, stop:])


def _refit(state: _State) -> None:
    """Fit the scale of every row in the metric of the Hessian, unless it would become zero or negative."""
    product = state.hessian.product(state.quantized, state.hessian.matrix)
    own = (product * state.quantized).sum(1)
    factor = (product * state.weight).sum(1) / torch.where(own > 0, own, 1)
    factor = torch.where((own > 0) & (factor > 0), factor, 1)
    state.rescale(factor)
