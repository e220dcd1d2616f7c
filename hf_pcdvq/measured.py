"""What was measured on a packed model and lies beside it: the report, the evaluation and the speed.

Each file is compared with the model as far as it can be: a number must not be published beside a model that it does not
belong to.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .evaluate import Evaluation
from .quantization_report import NAME as REPORT
from .report import FolderCount, readable_size

EVALUATION = "evaluation.json"
SPEED = "speed.json"
_FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """The records of a folder, each None if there is no such file.

    Attributes:
        report: `quantization_report.json`.
        evaluation: `evaluation.json`.
        speed: `speed.json`.
    """

    report: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    speed: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path, count: FolderCount) -> Measured:
        """Read and check them.

        Raises:
            ValueError: a file is damaged, was written by a newer version, or belongs to another model.
        """
        report = _read(folder / f"{REPORT}.json")
        if report is not None:
            _check_report(folder / f"{REPORT}.json", report, count)
        evaluation = _read(folder / EVALUATION)
        if evaluation is not None:
            _check_evaluation(folder / EVALUATION, evaluation, count)
        speed = _read(folder / SPEED)
        if speed is not None:
            _check_speed(folder / SPEED, speed)
        return cls(report, evaluation, speed)

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Results of zero-shot tasks."""
        return (self.evaluation or {}).get("tasks") or []

    def card_facts(self) -> dict[str, Any]:
        """What the card's template asks for. Without an evaluation, the comparison that a calibrated run made."""
        evaluation, noise, speed = None, None, None
        if self.evaluation is not None:
            record = self.evaluation
            scope = {
                "text": f"`{Path(record['text']).name}`",
                "device": record["device"],
                "command": record["command"],
            }
            evaluation = {**record["metrics"], **scope, "held_out": False}
            if record["noise_floor"]:
                noise = {"dtype": record["noise_floor"]["dtype"], **record["noise_floor"]["metrics"]}
        elif self.report is not None and self.report["comparison"]:
            scope = {"text": "the calibration data", "device": self.report["device"], "command": None}
            evaluation = {**self.report["comparison"], **scope, "held_out": True}
        if self.speed is not None:
            peak = self.speed["peak_memory_bytes"]
            speed = {**self.speed, "peak_memory": readable_size(peak) if peak else None}
        return {"evaluation": evaluation, "noise": noise, "tasks": [_task_row(t) for t in self.tasks], "speed": speed}


def _task_row(task: dict[str, Any]) -> dict[str, Any]:
    """A task with its two results as text; lm-eval knows no error of some metrics."""
    shown = {}
    for name in ("original", "packed"):
        error = task[f"{name}_stderr"]
        shown[name] = f"{task[name]:.4f}" if error is None else f"{task[name]:.4f} ± {error:.4f}"
    return {**task, **shown}


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}. Measure again") from error


def _check_format(file: Path, record: dict[str, Any]) -> None:
    if record.get("format") != _FORMAT:
        raise ValueError(
            f"{file} has the format {record.get('format')!r}, this hf_pcdvq reads {_FORMAT}. Upgrade it: "
            "pip install -U hf_pcdvq; or measure again"
        )


def _check_report(file: Path, report: dict[str, Any], count: FolderCount) -> None:
    # Through the class, because a newer version may have added fields.
    same = (
        count.config is not None
        and type(count.config).from_dict(report["config"]).to_dict() == count.config.to_dict()
    )
    if not same or report["bits_per_packed_weight"] != count.bits_per_packed_weight:
        raise ValueError(
            f"{file} belongs to another model: its settings or its bits per weight are not those of the files beside it. "
            "Delete it, or quantize again"
        )


def _check_evaluation(file: Path, record: dict[str, Any], count: FolderCount) -> None:
    _check_format(file, record)
    missing = {"text", "metrics", "noise_floor", "tasks", "device", "command"} - record.keys()
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; write it with hf-pcdvq eval")
    if record.get("bits_per_packed_weight") not in (None, count.bits_per_packed_weight):
        raise ValueError(
            f"{file} belongs to another model, of {record['bits_per_packed_weight']:.3f} bits per packed weight; the files "
            f"beside it have {count.bits_per_packed_weight:.3f}. Delete it, or measure again with hf-pcdvq eval"
        )
    _check_metrics(file, record["metrics"])
    if record["noise_floor"]:
        _check_metrics(file, record["noise_floor"]["metrics"])
    for task in record["tasks"] or []:
        if not all(
            isinstance(task[name], (int, float)) and math.isfinite(task[name]) for name in ("original", "packed")
        ):
            raise ValueError(f"{file}: task {task['task']!r} has no finite results; measure again")


def _check_metrics(file: Path, metrics: dict[str, Any]) -> None:
    """Refuse what no evaluation can have given."""
    expected = {field.name for field in fields(Evaluation)}
    if metrics.keys() != expected:
        raise ValueError(f"{file}: the metrics are {sorted(metrics)}, expected {sorted(expected)}; measure again")
    result = Evaluation(**metrics)
    plausible = (
        all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())
        and min(result.perplexity_original, result.perplexity_packed) >= 1
        and result.kl_mean >= -1e-6
        and result.kl_median <= result.kl_p90 <= result.kl_p99
        and 0 <= result.top1_agreement <= 1
        and result.predictions == result.windows * (result.context_length - 1)
    )
    if not plausible:
        raise ValueError(
            f"{file} holds metrics that no evaluation gives: {metrics}. Measure again with hf-pcdvq eval"
        )


def _check_speed(file: Path, record: dict[str, Any]) -> None:
    _check_format(file, record)
    rate = record.get("tokens_per_second")
    if not isinstance(rate, float) or not math.isfinite(rate) or rate <= 0 or not record.get("device"):
        raise ValueError(f"{file} names no speed and device; write it with hf-pcdvq speed")
