"""Packed tensors of random bits, for code that needs a weight but no model: tests, tuning, benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import PackedWeight, family_of


def random_packed(
    format: str, rows: int, columns: int, seed: int = 0, device: str | torch.device = "cpu", **parameters: Any
) -> list[Any]:
    """The op arguments of a weight with random codes: every bit pattern is a valid code.

    Args:
        format: name of the format.
        rows, columns: size of the weight; `columns` must suit the format.
        seed: seed of the codes.
        device: where to create them.
        parameters: non-tensor arguments that override the format's defaults (`window_bits` of stream).

    Raises:
        ValueError: there is no such format. TypeError: it has no such parameter.
    """
    family = family_of(format)
    unknown = parameters.keys() - family.parameters(format)
    if unknown:
        raise TypeError(f"{format} has no parameter {', '.join(sorted(unknown))}")
    generator = torch.Generator(device).manual_seed(seed)
    factors = family.random_scales(format)

    def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            values = torch.rand(shape, generator=generator, device=device) + 0.1
            return values.to(dtype) * factors.get(name, 1)
        info = torch.iinfo(dtype)
        bits = torch.randint(info.min, info.max + 1, shape, generator=generator, device=device, dtype=torch.int64)
        return bits.to(dtype)

    values: dict[str, Any] = {**family.parameters(format), **parameters}
    values |= {name: tensor(name, *spec) for name, spec in family.specs(format, rows, columns).items()}
    values |= family.random_tables(format, generator)
    return [values.get(argument.name) for argument in family.arguments]


def random_weight(
    format: str, rows: int, columns: int, seed: int = 0, device: str | torch.device = "cpu", **parameters: Any
) -> PackedWeight:
    """The same, as a validated weight."""
    packed = random_packed(format, rows, columns, seed, device, **parameters)
    return family_of(format).checked("random_weight", *packed)
