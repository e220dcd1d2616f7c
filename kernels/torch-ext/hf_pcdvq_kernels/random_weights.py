"""Packed tensors of random bits, for whatever needs a weight and no model: tests, tuning, benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import CCQ_LAYOUTS, GROUP, stream_layout
from .weights import CcqWeight, PcdvqWeight, StreamWeight, Weight


def random_packed(
    codec: str, rows: int, columns: int, seed: int = 0, device: str | torch.device = "cpu", window: int = 12
) -> list[Any]:
    """The arguments of `<method>_dequantize` before `dtype`, for a weight of random codes: every bit pattern is one.

    Args:
        codec: one of `formats.CODECS`.
        rows, columns: of the weight; `columns` as the format allows.
        seed: of the codes.
        device: where to make them.
        window: of the stream layout.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def bits(dtype: torch.dtype, *shape: int) -> Tensor:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, generator=generator, device=device, dtype=torch.int64).to(
            dtype
        )

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) + 0.1

    method, setting = codec.split()
    if method == "stream":
        words = stream_layout(float(setting), window).words(rows)
        return [bits(torch.int32, words, columns), positive(rows) / 148, float(setting), window]
    if method == "pcdvq":
        split = setting == "2.25"
        patterns = torch.randint(0, 100, (512 if split else 128, 8), generator=generator, device=device).to(
            torch.int8
        )
        magnitude = bits(torch.uint8, rows, columns // 32) if split else None
        return [bits(torch.int16, rows, columns // 8), magnitude, positive(rows), patterns, positive(4) / 127]
    layout = CCQ_LAYOUTS[setting]
    groups = columns // GROUP
    words = bits(layout.storage, rows, groups * layout.words)
    if not layout.clustered:
        return [words, positive(rows) / 100, None, None, None, setting]
    local = bits(torch.uint8, rows, (groups + 1) // 2)
    return [words, positive(rows), local, positive(rows) * 100, positive(rows) * 50, setting]


def random_weight(codec: str, rows: int, columns: int, seed: int = 0, device: str | torch.device = "cpu") -> Weight:
    """The same as a validated weight."""
    classes: dict[str, Any] = {"pcdvq": PcdvqWeight, "ccq": CcqWeight, "stream": StreamWeight}
    return classes[codec.split()[0]].checked("random_weight", *random_packed(codec, rows, columns, seed, device))
