"""Measures which launch config is fastest on a device. Run by `hf-pcdvq tune`, never while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from ..random_weights import random_weight
from . import launch_config, product, timing, tuned
from .launch_config import Shape
from .tuned import TunedConfig


def tune(shapes: Iterable[Shape], device: torch.device) -> Iterator[tuple[Shape, TunedConfig]]:
    """Measure products in turn, and add each to the device's file when it is done.

    Raises:
        RuntimeError: the device is not a GPU.
    """
    if device.type == "cpu":
        raise RuntimeError("launch configs are measured on a GPU, and PyTorch finds none here")
    file = tuned.file_of(device)
    for shape in shapes:
        found = measure(shape, device)
        tuned.write(file, tuned.device_name(device), {**tuned.measured(device), shape: found})
        yield shape, found


def measure(shape: Shape, device: torch.device) -> TunedConfig:
    """The fastest config of a bfloat16 product, with activations rotated as in a layer."""
    first = random_weight(shape.format, shape.rows, shape.columns, device=device)
    nbytes = first.weight.numel() * first.weight.element_size()
    seeds = range(1, timing.copies(nbytes))
    weights = [first, *(random_weight(shape.format, shape.rows, shape.columns, seed, device) for seed in seeds)]
    x = torch.randn(shape.tokens, shape.columns, device=device, dtype=torch.bfloat16)
    signs = torch.ones(min(128, shape.columns & -shape.columns), device=device)
    default = launch_config.default(shape, launch_config.processors(device))
    times = {}
    for config in {default: None, **dict.fromkeys(launch_config.candidates(shape))}:
        calls = [partial(product.product, x[None], weight, signs, config) for weight in weights]
        times[config] = timing.seconds_per_call(calls, device)
    best = min(times, key=times.__getitem__)
    return TunedConfig(best, times[best], times[default])
