"""`Recovery`: the options of a recovery."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Fields with their smallest and largest values.
_INTEGERS = (
    ("steps", 1, 1 << 24),
    ("batch", 1, 1 << 16),
    ("length", 2, 1 << 20),
    ("held_out", 1, 1 << 16),
    ("evaluations", 1, 1 << 16),
    ("patience", 1, 1 << 16),
    ("seed", 0, (1 << 31) - 1),
)
_OPTIONAL = (("samples", 1, 1 << 30), ("micro_batch", 1, 1 << 16), ("cache_bytes", 0, 1 << 60))


@dataclass(frozen=True)
class Recovery:
    """Options of a recovery, JSON-clean. docs/recovery.md has the measurements behind the defaults.

    Attributes:
        steps: number of optimizer steps.
        batch: windows per step, over all processes.
        length: tokens per window, where text is cut into windows.
        samples: number of different windows to train on; more steps repeat them. None takes as many as the steps need of
            a dataset, and at most 64 of what the model writes itself.
        learning_rate: the largest; of a row's factor, and of norms and biases in units of their root mean square.
        warmup: fraction of the steps in which it rises; afterwards it falls along a cosine to a tenth.
        held_out: number of windows to judge on, at most.
        evaluations: how often to judge during the run, besides before it.
        patience: stop after so many evaluations without improvement, of those after the warm-up.
        micro_batch: windows that pass through the models at once; None takes as many as keep the logits small.
        checkpointing: compute the activations of a decoder block twice rather than keep them, which saves memory.
        cache_bytes: how much of the original's logits may be kept on disk if windows are repeated; 0 keeps none. None
            keeps at most 4 GiB and half of the free space on a CPU, and none on an accelerator, which computes them sooner than it reads them.
        seed: orders the windows to train on, selects them from the text, and seeds the text where the model writes it.

    Raises:
        ValueError: a field has an invalid value.
    """

    steps: int = 48
    batch: int = 4
    length: int = 512
    samples: int | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.1
    held_out: int = 8
    evaluations: int = 8
    patience: int = 3
    micro_batch: int | None = None
    checkpointing: bool = False
    cache_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (*_INTEGERS, *_OPTIONAL):
            value = getattr(self, name)
            if value is None and (name, low, high) in _OPTIONAL:
                continue
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"Recovery: {name} must be an integer from {low} to {high}, got {value!r}")
        for name, most in (("learning_rate", 1.0), ("warmup", 0.9)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ValueError(f"Recovery: {name} must be a number from 0 to {most}, got {value!r}")
        if not isinstance(self.checkpointing, bool):
            raise ValueError(f"Recovery: checkpointing must be True or False, got {self.checkpointing!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean."""
        return asdict(self)
