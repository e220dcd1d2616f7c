"""Quantizing weights that share an input: rotation, correction of the target, error feedback, packing."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..codecs import hadamard
from ..codecs.base import Codec, Packed
from ..processes import Processes
from .feedback import quantize_with_feedback
from .hessian import (
    GroupedHessian,
    Hessian,
    InputMoments,
    UnusableHessian,
    prepare_guided,
    prepare_hessian,
    symmetric,
)
from .records import LayerRecord
from .settings import OWN_SHARE, Calibration


def quantize_layers(
    weights: dict[str, Tensor],
    moments: InputMoments | None,
    codec: Codec,
    settings: Calibration,
    processes: Processes | None = None,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Quantize the weights of layers that have the same input.

    Without a usable Hessian the weights are rounded to the nearest codes, and their records say so.

    Args:
        weights: `[N, K]` of any floating dtype by the name of the layer, with one `K` and on one device; not changed.
        moments: of the common input, on that device; None if the layers did not run.
        processes: those that share the rows, all of which pass the same; None: this one quantizes all.

    Returns:
        The packed tensors of every weight, and a record of each.

    Raises:
        ValueError: a weight is not finite.
    """
    processes = processes or Processes.alone()
    for name, matrix in weights.items():
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{name}: the weight holds infinite or NaN values; the checkpoint is damaged")
    columns = next(iter(weights.values())).shape[1]
    rows = row_shares({name: len(matrix) for name, matrix in weights.items()}, codec.row_multiple, processes)
    own = {name: matrix[rows[name]] for name, matrix in weights.items()}
    packed, measured, hessian, notes = _quantize_rows(own, moments, codec, settings, processes)
    tensors = {(name, suffix): tensor for name, some in packed.items() for suffix, tensor in some.items()}
    parts = processes.gather(tensors, measured)
    records = [
        _record(name, columns, [of[name] for _, of in parts if name in of], hessian, notes.get(name))
        for name in weights
    ]
    suffixes = codec.specs(codec.row_multiple, columns)
    whole = {
        name: {
            suffix: _joined([found[name, suffix] for found, _ in parts if (name, suffix) in found])
            for suffix in suffixes
        }
        for name in weights
    }
    return whole, records


def row_shares(sizes: dict[str, int], multiple: int, processes: Processes) -> dict[str, slice]:
    """The rows of layers, of which they have so many, that this process quantizes: adjacent ones, about as many as others."""
    units = [(name, start) for name, rows in sizes.items() for start in range(0, rows, multiple)]
    found = dict.fromkeys(sizes, slice(0, 0))
    for name, start in processes.share(units):
        first = found[name].start if found[name].stop else start
        found[name] = slice(first, min(start + multiple, sizes[name]))
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _quantize_rows(
    weights: dict[str, Tensor],
    moments: InputMoments | None,
    codec: Codec,
    settings: Calibration,
    processes: Processes,
) -> tuple[dict[str, Packed], dict[str, _Measured], Hessian | None, dict[str, str | None]]:
    """Quantize the rows of this process, `[n, K]` of every layer; n may be 0.

    Returns:
        Of layers with n > 0 the packed tensors and measurements; the Hessian, if it could be used; and notes.
    """
    started = time.perf_counter()
    weight = torch.cat([matrix.detach().float() for matrix in weights.values()])
    sizes = {name: len(matrix) for name, matrix in weights.items()}
    signs = codec.tables(weight.shape[1])["signs"].to(weight.device) if codec.max_block else None
    rotated = _rotate(weight, signs)
    hessian, notes = None, dict[str, str | None]()
    try:
        hessian = prepare_hessian(moments, settings.damp_percent, signs)
        notes = dict.fromkeys(weights, hessian.note)
        target = _target(rotated, weight, moments, hessian, signs, settings, list(sizes.values()), processes)
    except UnusableHessian as reason:
        notes = dict.fromkeys(weights, f"{reason}: rounded to the nearest codes")
    some = {name: size for name, size in sizes.items() if size}
    if not some:
        return {}, {}, hessian, notes
    if hessian is None:
        packed = [codec.encode(weights[name]) for name in some]
        tables = {name: table.to(weight.device) for name, table in codec.tables(weight.shape[1]).items()}
        quantized = torch.cat([codec.decode_rotated(part, tables, torch.float32) for part in packed])
    else:
        packed, quantized, found = _with_feedback(target, hessian, moments, some, codec, settings, signs)
        notes |= found
    seconds = time.perf_counter() - started
    parts = zip(some, rotated.split(list(some.values())), (rotated - quantized).split(list(some.values())))
    measured = {
        name: _Measured.of(rows, error, hessian, seconds * len(rows) / len(weight)) for name, rows, error in parts
    }
    return dict(zip(some, packed)), measured, hessian, notes


def _with_feedback(
    target: Tensor,
    hessian: Hessian,
    moments: InputMoments,
    sizes: dict[str, int],
    codec: Codec,
    settings: Calibration,
    signs: Tensor | None,
) -> tuple[list[Packed], Tensor, dict[str, str]]:
    """The packed tensors of stacked layers with so many rows, what they decode to float32 `[N, K]`, and notes by layer."""
    rows = list(sizes.values())
    # One encoder for all, where rows do not depend on each other: fewer and larger calls.
    shares = rows if codec.row_multiple > 1 else [len(target)]
    encoders = [codec.unit_encoder(part) for part in target.split(shares)]
    metric, notes = _metric(hessian, moments, sizes, settings, signs)
    if isinstance(metric, GroupedHessian):
        for encoder, importance in zip(encoders, metric.importance.split(shares)):
            encoder.weigh(importance)
    codes, quantized = quantize_with_feedback(target, metric, encoders, settings)
    packed = [encoder.pack(part) for encoder, part in zip(encoders, codes.split(shares))]
    return packed if shares == rows else _split(packed[0], rows, codec), quantized, notes


def _metric(
    hessian: Hessian, moments: InputMoments, sizes: dict[str, int], settings: Calibration, signs: Tensor | None
) -> tuple[Hessian | GroupedHessian, dict[str, str]]:
    """What errors cost: by groups of output channels if sensitivities are known and usable, or else the same for all.

    Returns:
        It, and by the name of the layer what its record should note.
    """
    metric: Hessian | GroupedHessian = hessian
    found: dict[str, str] = {}
    unknown = sizes.keys() - moments.guided.keys()
    if not unknown:
        try:
            metric = prepare_guided(moments, sizes, settings.damp_percent, signs)
            found = metric.notes
        except UnusableHessian as reason:
            found = dict.fromkeys(sizes, f"not weighed by sensitivity ({reason})")
    elif settings.fisher_groups:
        names = ", ".join(sorted(unknown))
        found = dict.fromkeys(sizes, f"not weighed by sensitivity (that to {names} is not known)")
    notes = {name: "; ".join(filter(None, (hessian.note, found.get(name)))) for name in sizes}
    return metric, {name: note for name, note in notes.items() if note}


def _split(packed: Packed, sizes: list[int], codec: Codec) -> list[Packed]:
    """The packed tensors of stacked layers, each with its own memory."""
    parts, start = [], 0
    for size in sizes:
        rows = codec.rows(packed, start, start + size)
        parts.append({suffix: tensor.clone() for suffix, tensor in rows.items()})
        start += size
    return parts


def _rotate(weight: Tensor, signs: Tensor | None) -> Tensor:
    return weight if signs is None or not len(weight) else hadamard.rotate(weight, signs)


def _target(
    rotated: Tensor,
    weight: Tensor,
    moments: InputMoments,
    hessian: Hessian,
    signs: Tensor | None,
    settings: Calibration,
    sizes: list[int],
    processes: Processes,
) -> Tensor:
    """The rotated weight to approximate, which compensates for part of the change in the layer's inputs.

    With inputs `x` here and `x0` in the original model, `W + W C H^-1`, `C = mean of (x0 - x) x^T`, is the linear
    layer that reproduces the original's outputs best in the mean square (as in GPTAQ, arXiv 2504.02692).
    """
    if not settings.correction or moments.cross is None:
        return rotated
    missing = _rotate(weight @ (moments.cross / moments.tokens), signs)
    step = hessian.solve(missing)
    if settings.correction != OWN_SHARE:
        return rotated + settings.correction * step
    parts = zip(weight.split(sizes), missing.split(sizes), step.split(sizes))
    changes = processes.sum(torch.stack([output_changes(rows, part, own, moments) for rows, part, own in parts]))
    shares = [predicted_share(change) for change in changes]
    return rotated + torch.cat([own * share for own, share in zip(step.split(sizes), shares)])


def output_changes(weight: Tensor, missing: Tensor, step: Tensor, moments: InputMoments) -> Tensor:
    """How much a layer's outputs have changed in the mean square, and how much of that its present inputs predict.

    With `D = mean of (x0 - x) x^T` and `S = mean of (x0 - x) (x0 - x)^T`, the outputs have changed by `W (x0 - x)`, in the
    mean square `tr(W S W^T)`; the part of it that is linear in `x` has `tr(W D H^-1 D^T W^T)` (CoreQ, arXiv 2602.05902).

    Args:
        weight: `W`, float32 `[N, K]`.
        missing, step: `W D` and `W D H^-1`, rotated, float32 `[N, K]`.
        moments: with `change`.

    Returns:
        Both, float64 `[2]`. Those of several rows are sums.
    """
    change = symmetric(moments.change) / moments.tokens
    total = ((weight @ change) * weight).sum(dtype=torch.float64)
    predicted = (step * missing).sum(dtype=torch.float64)
    return torch.stack([total, predicted])


def predicted_share(changes: Tensor) -> Tensor:
    """The share of the change in a layer's outputs that its present inputs predict, 0 to 1, a scalar; see `output_changes`."""
    total, predicted = changes
    return torch.where(total > 0, predicted / total, 0).clamp(0, 1).float()


@dataclass(frozen=True)
class _Measured:
    """Measurements of some rows of a layer, of which `largest` is a maximum and all others are sums."""

    rows: int
    largest: float
    fourth: float  # powers of the weights, each row divided by its root mean square
    noise: float
    signal: float
    lost: float  # what the error and the weight cost in the metric of the Hessian
    energy: float
    seconds: float

    @classmethod
    def of(cls, weight: Tensor, error: Tensor, hessian: Hessian | None, seconds: float) -> _Measured:
        """From the rotated weight and the error, float32 `[n, K]`."""
        mean = weight.square().mean(1, dtype=torch.float64)
        unit = weight / torch.where(mean > 0, mean.sqrt(), 1)[:, None]
        return cls(
            rows=len(weight),
            largest=unit.abs().amax().item(),
            fourth=unit.pow(4).sum(dtype=torch.float64).item(),
            noise=error.square().sum(dtype=torch.float64).item(),
            signal=weight.square().sum(dtype=torch.float64).item(),
            lost=hessian.loss(error).sum(dtype=torch.float64).item() if hessian else 0.0,
            energy=hessian.loss(weight).sum(dtype=torch.float64).item() if hessian else 0.0,
            seconds=seconds,
        )

    def __add__(self, other: _Measured) -> _Measured:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return _Measured(**{**sums, "largest": max(self.largest, other.largest)})


def _record(
    name: str, columns: int, parts: list[_Measured], hessian: Hessian | None, note: str | None
) -> LayerRecord:
    """The record of one layer with so many inputs, from the measurements of all its rows."""
    whole = reduce(add, parts)
    return LayerRecord(
        name=name,
        out_features=whole.rows,
        in_features=columns,
        kurtosis=whole.fourth / (whole.rows * columns),
        largest=whole.largest,
        snr=10 * math.log10(whole.signal / whole.noise) if whole.signal and whole.noise else None,
        proxy_loss=(whole.lost / whole.energy if whole.energy else 0.0) if hessian else None,
        tokens=hessian.tokens if hessian else 0,
        dead_inputs=hessian.dead if hessian else 0,
        damp_percent=hessian.damp_percent if hessian else 0.0,
        note=note,
        seconds=whole.seconds,
    )
