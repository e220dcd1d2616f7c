"""`Calibration`: what a calibrated quantization reads, and its options. Recorded in a packed model's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# Fields with the values they may have.
_INTEGERS = (
    ("samples", 1, 1 << 20),
    ("length", 2, 1 << 20),
    ("holdout", 0, 1 << 20),
    ("seed", 0, (1 << 31) - 1),
    ("sweeps", 0, 100),
    ("expert_tokens", 1, 1 << 30),
)
_NUMBERS = (("damping", 1e-8, 10.0), ("correction", 0.0, 1.0))


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibrated quantization, JSON-clean. docs/quality.md has the figures behind the defaults.

    Attributes:
        data: the path of a text or .jsonl file, or the name of a data set on the Hub, `"name"` or
            `"name:configuration"`. None: the model itself writes the text.
        samples: number of windows of tokens.
        length: tokens per window.
        holdout: further windows, not calibrated on, on which the report compares the two models; 0 leaves that out.
        seed: chooses the windows, and the text where the model writes it.
        damping: added to the diagonal of every Hessian, as a fraction of its mean; raised where that does not suffice.
        correction: share, 0 to 1, of the accumulated change of a layer's inputs that its weights are made to undo.
        ordered: quantize the inputs of most energy first.
        sweeps: passes of coordinate descent over the codes after error feedback.
        refit: fit the scales to the codes in the metric of the Hessian.
        expert_tokens: an expert that fewer tokens are routed to is calibrated on all tokens of its layer.
        all_experts: calibrate every expert on all tokens of its layer, wherever they are routed.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    data: str | None = None
    samples: int = 128
    length: int = 1024
    holdout: int = 8
    seed: int = 0
    damping: float = 0.01
    correction: float = 0.5
    ordered: bool = True
    sweeps: int = 1
    refit: bool = True
    expert_tokens: int = 128
    all_experts: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"Calibration: {name} must be an integer from {low} to {high}, got {value!r}")
        for name, least, most in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ValueError(f"Calibration: {name} must be a number from {least} to {most}, got {value!r}")
        for name in ("ordered", "refit", "all_experts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Calibration: {name} must be True or False, got {getattr(self, name)!r}")
        if self.data is not None and not (isinstance(self.data, str) and self.data):
            raise ValueError(f"Calibration: data must be a path, a name or None, got {self.data!r}")

    @classmethod
    def of(cls, value: Any) -> Calibration | None:
        """From what a config may hold: a `Calibration`, its dictionary, the name of the data alone, or None.

        Raises:
            ValueError: it is none of these, or a dictionary with an unknown field.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (str, Path)):
            return cls(data=str(value))
        if not isinstance(value, dict):
            raise ValueError(f"calibration must be a Calibration, a dictionary or a name, got {value!r}")
        unknown = value.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"calibration: unknown field {', '.join(map(repr, sorted(unknown)))}")
        return cls(**value)

    def with_data(self, data: str | None) -> Calibration:
        return replace(self, data=data)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean."""
        return asdict(self)
