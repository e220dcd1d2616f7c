"""What an allocation of bits is to reach."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Self

AUTO = "auto"  # the value of `bits` that asks for an allocation

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]B|[KMGT]iB)", re.IGNORECASE)
_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


@dataclass(frozen=True)
class Target:
    """The most that a model may take: one of the two is given.

    Attributes:
        bits: per packed weight, as `hf-pcdvq inspect` counts them: companions and padding included.
        size: bytes of the safetensors file, embeddings, norms and header included.
    """

    bits: float | None
    size: int | None

    @classmethod
    def of(cls, target_bits: Any, target_size: Any) -> Self | None:
        """From the fields of a config; None if both are None.

        Raises:
            ValueError: both are given, or one is not a number of bits, or not a size.
        """
        if target_bits is None and target_size is None:
            return None
        if target_bits is not None and target_size is not None:
            raise ValueError(f"give target_bits ({target_bits!r}) or target_size ({target_size!r}), not both")
        if target_bits is not None:
            return cls(_bits(target_bits), None)
        return cls(None, _size(target_size))

    def __str__(self) -> str:
        return f"{self.bits:g} bits per packed weight" if self.size is None else f"{self.size:,} bytes"


def _bits(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"target_bits must be a positive number of bits per weight, got {value!r}")
    return float(value)


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'target_size must be a number of bytes, or a size like "1.2GB" or "900MiB", got {value!r}')
    return int(float(found[1]) * {**_DECIMAL, **_BINARY}[found[2].lower()])
