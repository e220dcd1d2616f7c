"""The measurements saved beside a packed model: report, evaluation and speed.

Each is compared with the model as far as possible, so that no number of another model is published with it.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ..calibration.report import NAME as REPORT
from ..evaluation.metrics import Evaluation
from ..evaluation.record import NAME as EVALUATION
from ..evaluation.record import EvaluationRecord, evaluation_from
from ..evaluation.speed import NAME as SPEED
from ..evaluation.speed import Speed
from ..files.fields import number, positive_integer, short_text, short_texts
from ..files.records import read_json
from ..files.size import FolderCount


@dataclass(frozen=True)
class Measurements:
    """The records in a model's folder, each None if its file is missing.

    Attributes:
        report: what a card states of `quantization_report.json`: `config`, `bits_per_packed_weight`, `windows`, `length`,
            `seconds`, `device`, `versions`, and `comparison`, an `Evaluation` or None.
        evaluation: `evaluation.json`.
        speed: `speed.json`.
    """

    report: dict[str, Any] | None
    evaluation: EvaluationRecord | None
    speed: Speed | None

    @classmethod
    def read(cls, count: FolderCount) -> Measurements:
        """Read the records beside a saved model, and check that they belong to it.

        Raises:
            ValueError: a file is damaged, was written by a newer version, or belongs to another model.
        """
        report, evaluation, speed = (count.folder / f"{name}.json" for name in (REPORT, EVALUATION, SPEED))
        return cls(
            _report(report, count) if report.is_file() else None,
            _evaluation(evaluation, count) if evaluation.is_file() else None,
            _speed(speed) if speed.is_file() else None,
        )


def _report(file: Path, count: FolderCount) -> dict[str, Any]:
    report = read_json(file, _report_fields)
    if report["comparison"] is not None:
        _check_metrics(file, report["comparison"])
    # Parsed into a config first, because a newer version may have added fields.
    same = (
        count.config is not None
        and type(count.config).from_dict(report["config"]).to_dict() == count.config.to_dict()
    )
    if not same or report["bits_per_packed_weight"] != count.bits_per_packed_weight:
        raise ValueError(
            f"{file} belongs to another model: its settings or bits per weight differ from those of the files beside it. "
            "Delete it, or quantize again"
        )
    return report


def _report_fields(content: Any) -> dict[str, Any]:
    """The fields of a report that a card states, each of the type that a run writes."""
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError("expected a report with the config of the run; quantize again")
    report = {name: content.get(name) for name in ("config", "bits_per_packed_weight")}
    report["seconds"] = number("seconds", content.get("seconds"))
    report["device"] = short_text("device", content.get("device"))
    report["versions"] = short_texts("versions", content.get("versions"))
    for name in ("windows", "length"):
        report[name] = positive_integer(name, content.get(name))
    comparison = content.get("comparison")
    report["comparison"] = None if comparison is None else evaluation_from("comparison", comparison)
    return report


def _evaluation(file: Path, count: FolderCount) -> EvaluationRecord:
    record = read_json(file, EvaluationRecord.from_dict)
    if record.bits_per_packed_weight not in (None, count.bits_per_packed_weight):
        raise ValueError(
            f"{file} belongs to another model, of {record.bits_per_packed_weight:.3f} bits per packed weight; the files "
            f"beside it have {count.bits_per_packed_weight:.3f}. Delete it, or measure again with hf-pcdvq eval"
        )
    _check_metrics(file, record.metrics)
    if record.noise_floor:
        _check_metrics(file, record.noise_floor.metrics)
    for task in record.tasks or []:
        if not _finite(task.original, task.packed):
            raise ValueError(f"{file}: task {task.task!r} has no finite results; measure again")
    return record


def _speed(file: Path) -> Speed:
    speed = read_json(file, Speed.from_dict)
    if not _finite(speed.tokens_per_second) or speed.tokens_per_second <= 0:
        raise ValueError(f"{file} has no valid speed; create it with hf-pcdvq speed")
    return speed


def _check_metrics(file: Path, metrics: Evaluation) -> None:
    """Reject metrics that no evaluation can have returned."""
    plausible = (
        _finite(*astuple(metrics))
        and min(metrics.perplexity_original, metrics.perplexity_packed) >= 1
        and metrics.kl_mean >= -1e-6
        and metrics.kl_median <= metrics.kl_p90 <= metrics.kl_p99
        and 0 <= metrics.top1_agreement <= 1
        and metrics.predictions == metrics.windows * (metrics.context_length - 1)
    )
    if not plausible:
        raise ValueError(
            f"{file} has metrics that no evaluation can return: {metrics.to_dict()}. Measure again with hf-pcdvq eval"
        )


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)
