"""Quantizing weights that share an input: rotation, correction of the target, error feedback, packing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..codecs import hadamard
from ..codecs.base import Codec, Packed, UnitEncoder
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
    device, columns = next((matrix.device, matrix.shape[1]) for matrix in weights.values())
    sizes = {name: len(matrix) for name, matrix in weights.items()}
    signs = codec.tables(columns)["signs"].to(device) if codec.max_block else None
    hessian, metric = None, None
    try:
        hessian = prepare_hessian(moments, settings.damp_percent, signs)
        metric, notes = _metric(hessian, moments, sizes, settings, signs)
    except UnusableHessian as reason:
        notes = dict.fromkeys(weights, f"{reason}: rounded to the nearest codes")
    count = 1 if isinstance(metric, GroupedHessian) else part_count(sum(sizes.values()), device, processes)
    parts = [
        {name: weights[name][rows] for name, rows in part.items()}
        for part in processes.share(row_parts(sizes, codec.row_multiple, count))
    ]
    if metric is None:
        found: Iterable[_Found] = [_rounded(part, codec, signs) for part in parts]
    else:
        found = _with_feedback(parts, moments, hessian, metric, codec, settings, signs, processes)
    return _joined(list(weights), columns, list(found), hessian, notes, processes)


# Rows of a part on a CPU, at most.
_ROWS = 512


def part_count(rows: int, device: torch.device, processes: Processes) -> int:
    """In how many parts rows are quantized, one after the other or by several processes.

    The last bits of products may depend on how many rows there are. On a CPU this number therefore does not depend on
    that of the processes. An accelerator would be slow with many parts: each process takes one.
    """
    return max(1, -(-rows // _ROWS)) if device.type == "cpu" else processes.count


def row_parts(sizes: dict[str, int], multiple: int, count: int) -> list[dict[str, slice]]:
    """Stacked layers, of which each has so many rows, in at most `count` parts of about as many, cut at multiples of `multiple`."""
    units = [(name, start) for name, rows in sizes.items() for start in range(0, rows, multiple)]
    count = min(count, len(units))
    parts: list[dict[str, slice]] = [{} for _ in range(count)]
    for number, (name, start) in enumerate(units):
        part = parts[number * count // len(units)]
        part[name] = slice(part[name].start if name in part else start, min(start + multiple, sizes[name]))
    return parts


# The packed tensors of the rows of some layers, by their names, and measurements of each.
_Found = tuple[dict[str, Packed], dict[str, "_Measured"]]


def _joined(
    names: list[str],
    columns: int,
    found: list[_Found],
    hessian: Hessian | None,
    notes: dict[str, str],
    processes: Processes,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """The layers of the given names, in all processes, from the parts that each has found."""
    own = {
        (part, name, suffix): tensor
        for part, (packed, _) in enumerate(found)
        for name, tensors in packed.items()
        for suffix, tensor in tensors.items()
    }
    every = processes.gather(own, [measured for _, measured in found])
    tensors: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    for some, _ in every:
        for (_, name, suffix), tensor in some.items():
            tensors[name].setdefault(suffix, []).append(tensor)
    packed = {
        name: {suffix: parts[0] if len(parts) == 1 else torch.cat(parts) for suffix, parts in of.items()}
        for name, of in tensors.items()
    }
    measured = [part for _, parts in every for part in parts]
    records = [
        _record(name, columns, [part[name] for part in measured if name in part], hessian, notes.get(name))
        for name in names
    ]
    return packed, records


def _rounded(part: dict[str, Tensor], codec: Codec, signs: Tensor | None) -> _Found:
    """Rows of some layers, `[n, K]` each, rounded to the nearest codes."""
    started = time.perf_counter()
    packed = {name: codec.encode(rows) for name, rows in part.items()}
    rotated = _rotate(_stacked(part), signs)
    tables = {name: table.to(rotated.device) for name, table in codec.tables(rotated.shape[1]).items()}
    quantized = torch.cat([codec.decode_rotated(rows, tables, torch.float32) for rows in packed.values()])
    return packed, _measured(part, rotated, quantized, None, time.perf_counter() - started)


def _with_feedback(
    parts: list[dict[str, Tensor]],
    moments: InputMoments,
    hessian: Hessian,
    metric: Hessian | GroupedHessian,
    codec: Codec,
    settings: Calibration,
    signs: Tensor | None,
    processes: Processes,
) -> Iterator[_Found]:
    """Rows of some layers, `[n, K]` each, quantized with error feedback, part by part."""
    shares = _own_shares(parts, moments, hessian, signs, processes) if settings.correction == OWN_SHARE else {}
    encoders: list[list[UnitEncoder]] = []

    def targets() -> Iterator[tuple[Tensor, list[UnitEncoder]]]:
        for part in parts:
            target = _rotate(_stacked(part), signs)
            if settings.correction and moments.cross is not None:
                factors = [shares.get(name, settings.correction) for name in part]
                steps = _correction(part, moments, hessian, signs)[1].split([len(rows) for rows in part.values()])
                target = target + torch.cat([step * factor for step, factor in zip(steps, factors)])
            # One encoder for all, where rows do not depend on each other: fewer and larger calls.
            sizes = [len(rows) for rows in part.values()] if codec.row_multiple > 1 else [len(target)]
            encoders.append([codec.unit_encoder(rows) for rows in target.split(sizes)])
            if isinstance(metric, GroupedHessian):
                for encoder, importance in zip(encoders[-1], metric.importance.split(sizes)):
                    encoder.weigh(importance)
            yield target, encoders[-1]

    started = time.perf_counter()
    for part, (codes, quantized) in zip(parts, quantize_with_feedback(targets(), metric, settings)):
        own, sizes = encoders.pop(), [len(rows) for rows in part.values()]
        found = [encoder.pack(rows) for encoder, rows in zip(own, codes.split([encoder.rows for encoder in own]))]
        packed = dict(zip(part, found if len(found) == len(part) else _split(found[0], sizes, codec)))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        yield packed, _measured(part, _rotate(_stacked(part), signs), quantized, hessian, seconds)


def _stacked(part: dict[str, Tensor]) -> Tensor:
    return torch.cat([rows.detach().float() for rows in part.values()])


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


def _correction(
    part: dict[str, Tensor], moments: InputMoments, hessian: Hessian, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What compensates the change in the inputs of layers, `W C` and `W C H^-1`, rotated, float32 `[N, K]`.

    With inputs `x` here and `x0` in the original model, `W + W C H^-1`, `C = mean of (x0 - x) x^T`, is the linear
    layer that reproduces the original's outputs best in the mean square (as in GPTAQ, arXiv 2504.02692).
    """
    missing = _rotate(_stacked(part) @ (moments.cross / moments.tokens), signs)
    return missing, hessian.solve(missing)


def _own_shares(
    parts: list[dict[str, Tensor]],
    moments: InputMoments,
    hessian: Hessian,
    signs: Tensor | None,
    processes: Processes,
) -> dict[str, Tensor]:
    """For every layer the share of the correction that its inputs predict; none if the original's inputs are not known."""
    own: list[tuple[str, Tensor]] = []
    for part in parts if moments.cross is not None else ():
        sizes = [len(rows) for rows in part.values()]
        missing, step = (both.split(sizes) for both in _correction(part, moments, hessian, signs))
        own += [
            (name, output_changes(rows.float(), lost, change, moments))
            for (name, rows), lost, change in zip(part.items(), missing, step)
        ]
    sums: dict[str, Tensor] = {}
    for _, changes in processes.gather({}, [(name, change.cpu()) for name, change in own]):
        for name, change in changes:
            sums[name] = sums[name] + change if name in sums else change
    return {name: predicted_share(change).to(hessian.matrix.device) for name, change in sums.items()}


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


def _measured(
    part: dict[str, Tensor], rotated: Tensor, quantized: Tensor, hessian: Hessian | None, seconds: float
) -> dict[str, _Measured]:
    """Measurements of the rows of some layers, from their rotated weights and what these are quantized to, `[N, K]`."""
    sizes = [len(rows) for rows in part.values()]
    return {
        name: _Measured.of(rows, error, hessian, seconds * len(rows) / len(rotated))
        for name, rows, error in zip(part, rotated.split(sizes), (rotated - quantized).split(sizes))
    }


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
