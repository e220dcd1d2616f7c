"""`Calibration`: dataset and options of a calibrated quantization. A packed model's config.json records them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files.text import without_place

# Fields with their smallest and largest values.
_INTEGERS = (
    ("samples", 1, 1 << 20),
    ("length", 2, 1 << 20),
    ("holdout", 0, 1 << 20),
    ("seed", 0, (1 << 31) - 1),
    ("sweeps", 0, 100),
    ("expert_tokens", 1, 1 << 30),
    ("fisher_groups", 0, 64),
    ("tune_steps", 0, 1 << 20),
)
_NUMBERS = (("damp_percent", 1e-8, 10.0), ("correction", 0.0, 1.0), ("tune_rate", 0.0, 1.0))
OWN_SHARE = "own"
_FLAGS = ("desc_act", "refit", "all_experts")


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibrated quantization, JSON-clean. docs/quality.md has the measurements behind the defaults.

    Attributes:
        dataset: path of a text or .jsonl file, or name of a dataset on the Hub, `"name"` or `"name:configuration"`;
            None: the model generates its own calibration text.
        samples: number of windows of tokens.
        length: tokens per window.
        holdout: further windows, not calibrated on, on which the report compares the two models; 0 skips that. The
            original's logits on them are kept in memory meanwhile.
        seed: selects the windows, and seeds the text where the model generates it.
        damp_percent: added to the diagonal of every Hessian, as a fraction of its mean (0.01 is one percent); raised
            where that is not enough.
        correction: fraction, 0 to 1, of the accumulated change in a layer's inputs that its weights compensate for;
            "own" takes for every layer the fraction that its inputs predict.
        desc_act: quantize the inputs in order of decreasing activation energy.
        sweeps: passes of coordinate descent over the codes after error feedback.
        refit: fit the scales to the codes in the metric of the Hessian.
        expert_tokens: an expert that receives fewer tokens is calibrated on all tokens of its layer.
        all_experts: calibrate every expert on all tokens of its layer, however they are routed.
        fisher_groups: weigh the tokens by how much the model's predictions depend on a layer's outputs there, with so many
            groups of output channels; 0 weighs all alike. It takes a forward and a backward pass of the whole model, which
            must fit the device, over all windows, and as many Hessians as there are groups. In main memory it takes 4
            bytes for every token, group and layer, of the blocks that are not finished yet: with 128 windows of 1024
            tokens, 0.5 MiB for every layer and group. Experts are not weighed.
        tune_steps: after every decoder block, train the ones that are still dense for so many steps to predict what the
            original predicts, so that they make up for the errors of those that are packed; 0 does not. It takes a
            second copy of the model and 12 bytes for every weight besides, all on the device.
        tune_rate: the learning rate of that.

    Raises:
        ValueError: a field has an invalid value.
    """

    dataset: str | None = None
    samples: int = 128
    length: int = 1024
    holdout: int = 8
    seed: int = 0
    damp_percent: float = 0.01
    correction: float | str = 0.5
    desc_act: bool = True
    sweeps: int = 1
    refit: bool = True
    expert_tokens: int = 128
    all_experts: bool = False
    fisher_groups: int = 0
    tune_steps: int = 0
    tune_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"Calibration: {name} must be an integer from {low} to {high}, got {value!r}")
        for name, least, most in _NUMBERS:
            value = getattr(self, name)
            if (name, value) == ("correction", OWN_SHARE):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ValueError(f"Calibration: {name} must be a number from {least} to {most}, got {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Calibration: {name} must be True or False, got {getattr(self, name)!r}")
        if self.dataset is not None and not (isinstance(self.dataset, str) and self.dataset):
            raise ValueError(f"Calibration: dataset must be a path, a name or None, got {self.dataset!r}")

    @classmethod
    def of(cls, value: Any) -> Calibration | None:
        """From what a config accepts: a `Calibration`, a dictionary of its fields, just a `dataset`, or None.

        Raises:
            ValueError: it is none of these, or a dictionary with an unknown field.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (str, Path)):
            return cls(dataset=str(value))
        if not isinstance(value, dict):
            raise ValueError(f"calibration must be a Calibration, a dictionary or a name, got {value!r}")
        unknown = value.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"calibration: unknown field {', '.join(map(repr, sorted(unknown)))}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean. Of a dataset on this machine, only the name of the file: they are published."""
        return {**asdict(self), "dataset": None if self.dataset is None else without_place(self.dataset)}
