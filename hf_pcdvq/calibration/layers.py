"""Quantizing weights that share an input: rotation, correction of the target, error feedback, packing."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..codecs import hadamard
from ..codecs.base import Codec, Packed
from .feedback import proxy_loss, quantize_with_feedback
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
    weights: dict[str, Tensor], moments: InputMoments | None, codec: Codec, settings: Calibration
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Quantize the weights of layers that have the same input.

    Without a usable Hessian the weights are rounded to the nearest codes, and their records say so.

    Args:
        weights: `[N, K]` of any floating dtype by the name of the layer, with one `K` and on one device; not changed.
        moments: of the common input, on that device; None if the layers did not run.

    Returns:
        The packed tensors of every weight, and a record of each.

    Raises:
        ValueError: a weight is not finite.
    """
    started = time.perf_counter()
    weight = torch.cat([matrix.detach().float() for matrix in weights.values()])
    if not torch.isfinite(weight).all():
        raise ValueError(f"{', '.join(weights)}: the weight holds infinite or NaN values; the checkpoint is damaged")
    signs = codec.tables(weight.shape[1])["signs"].to(weight.device) if codec.max_block else None
    rotated = _rotate(weight, signs)
    sizes = [len(matrix) for matrix in weights.values()]
    hessian = None
    try:
        hessian = prepare_hessian(moments, settings.damp_percent, signs)
    except UnusableHessian as reason:
        notes = dict.fromkeys(weights, f"{reason}: rounded to the nearest codes")
        packed = [codec.encode(matrix) for matrix in weights.values()]
        tables = {name: table.to(weight.device) for name, table in codec.tables(weight.shape[1]).items()}
        quantized = torch.cat([codec.decode_rotated(part, tables, torch.float32) for part in packed])
    else:
        target = _target(rotated, weight, moments, hessian, signs, settings, sizes)
        # One encoder for all, where rows do not depend on each other: fewer and larger calls.
        shares = sizes if codec.row_multiple > 1 else [len(target)]
        encoders = [codec.unit_encoder(rows) for rows in target.split(shares)]
        metric, notes = _metric(hessian, moments, dict(zip(weights, sizes)), settings, signs)
        if isinstance(metric, GroupedHessian):
            for encoder, importance in zip(encoders, metric.importance.split(shares)):
                encoder.weigh(importance)
        codes, quantized = quantize_with_feedback(target, metric, encoders, settings)
        packed = [encoder.pack(rows) for encoder, rows in zip(encoders, codes.split(shares))]
        if shares != sizes:
            packed = _split(packed[0], sizes, codec)
    seconds = time.perf_counter() - started

    errors = (rotated - quantized).split(sizes)
    records = [
        _record(name, rows, error, hessian, notes.get(name), seconds * len(rows) / len(weight))
        for name, rows, error in zip(weights, rotated.split(sizes), errors)
    ]
    return dict(zip(weights, packed)), records


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
    return weight if signs is None else hadamard.rotate(weight, signs)


def _target(
    rotated: Tensor,
    weight: Tensor,
    moments: InputMoments,
    hessian: Hessian,
    signs: Tensor | None,
    settings: Calibration,
    sizes: list[int],
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
    return rotated + torch.cat([predicted_share(rows, part, own, moments) * own for rows, part, own in parts])


def predicted_share(weight: Tensor, missing: Tensor, step: Tensor, moments: InputMoments) -> Tensor:
    """The share of the change in a layer's outputs that its present inputs predict, 0 to 1, a scalar.

    With `D = mean of (x0 - x) x^T` and `S = mean of (x0 - x) (x0 - x)^T`, the outputs have changed by `W (x0 - x)`, in the
    mean square `tr(W S W^T)`; the part of it that is linear in `x` has `tr(W D H^-1 D^T W^T)` (CoreQ, arXiv 2602.05902).

    Args:
        weight: `W`, float32 `[N, K]`.
        missing, step: `W D` and `W D H^-1`, rotated, float32 `[N, K]`.
        moments: with `change`.
    """
    change = symmetric(moments.change) / moments.tokens
    total = ((weight @ change) * weight).sum(dtype=torch.float64)
    predicted = (step * missing).sum(dtype=torch.float64)
    return torch.where(total > 0, predicted / total, 0).clamp(0, 1).float()


def _record(
    name: str, weight: Tensor, error: Tensor, hessian: Hessian | None, note: str | None, seconds: float
) -> LayerRecord:
    """Measurements of one layer, from its rotated weight and the error, float32 `[N, K]`."""
    energy = weight.square().mean(1, dtype=torch.float64)
    unit = weight / torch.where(energy > 0, energy.sqrt(), 1)[:, None]
    noise = error.square().sum(dtype=torch.float64).item()
    signal = weight.square().sum(dtype=torch.float64).item()
    return LayerRecord(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        kurtosis=unit.pow(4).mean().item(),
        largest=unit.abs().amax().item(),
        snr=10 * math.log10(signal / noise) if signal and noise else None,
        proxy_loss=proxy_loss(error, weight, hessian) if hessian else None,
        tokens=hessian.tokens if hessian else 0,
        dead_inputs=hessian.dead if hessian else 0,
        damp_percent=hessian.damp_percent if hessian else 0.0,
        note=note,
        seconds=seconds,
    )
