"""The record of an evaluation: `evaluation.json`, which model cards and comparisons read, and a Markdown version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CONFIGS
from ..files.fields import number, positive_integer, short_text, short_texts
from ..files.folders import check_writable
from ..files.provenance import hub_name
from ..files.records import known_fields, read_json, write_text
from ..files.size import count_folder
from ..files.text import code_block, code_span, markdown, without_place
from .metrics import Evaluation
from .tables import TASK_HEADINGS, evaluation_rows, markdown_table, scope, task_rows

NAME = "evaluation"
FORMAT = 1


@dataclass(frozen=True)
class NoiseFloor:
    """The original against itself in another dtype: a divergence below this one says nothing about the packed model.

    Attributes:
        dtype: the other dtype, such as `"float32"`.
        metrics: the comparison; "packed" is the original in `dtype`.
    """

    dtype: str
    metrics: Evaluation


@dataclass(frozen=True)
class TaskScore:
    """One metric of one lm-eval task, of both models on the same samples.

    Attributes:
        task, metric: names as lm-eval prints them, such as `"piqa"` and `"acc_norm"`.
        original, packed: mean of the metric over the samples.
        original_stderr, packed_stderr: its standard error; None if lm-eval reports none.
        samples: number of samples.
        dataset: name of the task's data set on the Hub; None if it is not there.
    """

    task: str
    metric: str
    original: float
    original_stderr: float | None
    packed: float
    packed_stderr: float | None
    samples: int
    dataset: str | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """The results of an evaluation, and how they were obtained.

    Attributes:
        original, packed: folders, or names on the Hub.
        text: name of the text.
        tokens: hash of the windows' token ids; records with the same hash were measured on the same predictions.
        metrics: packed model against the original.
        noise_floor, tasks: None if they were not requested.
        bits_per_packed_weight: counted on the packed model's files; None if it has no layers packed by hf_pcdvq.
        bits_per_parameter: the same for the whole model; None if its files could not be counted.
        device: name of the device that the packed model ran on.
        versions: versions of the packages involved.
        command: what was typed.
    """

    original: str
    packed: str
    text: str
    tokens: str
    metrics: Evaluation
    noise_floor: NoiseFloor | None
    tasks: list[TaskScore] | None
    bits_per_packed_weight: float | None
    bits_per_parameter: float | None
    device: str
    versions: dict[str, str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean, with the number of this format."""
        return {"format": FORMAT, **asdict(self)}

    def without_places(self) -> EvaluationRecord:
        """The record as it is published: of folders and files on this machine, only their names."""
        original, packed, text = map(without_place, (self.original, self.packed, self.text))
        return replace(self, original=original, packed=packed, text=text)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationRecord:
        """The record from what `to_dict` returned; unknown fields are ignored.

        Raises:
            ValueError: the content has another format, is incomplete, or a field has another type.
        """
        known = known_fields(cls, content, FORMAT)
        for name in ("original", "packed", "text", "tokens", "device"):
            short_text(name, known[name])
        short_text("command", known["command"], 10_000)
        short_texts("versions", known["versions"])
        for name in ("bits_per_packed_weight", "bits_per_parameter"):
            if known[name] is not None:
                number(name, known[name])
        known["metrics"] = evaluation_from("metrics", known["metrics"])
        with _complete():
            floor = known["noise_floor"]
            if floor is not None:
                metrics = evaluation_from("noise_floor.metrics", floor["metrics"])
                known["noise_floor"] = NoiseFloor(short_text("noise_floor.dtype", floor["dtype"]), metrics)
            if known["tasks"] is not None:
                known["tasks"] = [_task_from(task) for task in known["tasks"]]
        return cls(**known)

    def write(self, folder: str | Path) -> None:
        """Write `evaluation.json` and `evaluation.md`, each of them atomically, without places on this machine."""
        folder, published = Path(folder), self.without_places()
        write_text(folder / f"{NAME}.json", json.dumps(published.to_dict(), indent=2) + "\n")
        write_text(folder / f"{NAME}.md", published.markdown())

    def markdown(self) -> str:
        """The figures as tables."""
        lines = ["# Evaluation", "", f"{code_span(self.packed)} against {code_span(self.original)}.", ""]
        metrics, floor = self.metrics, self.noise_floor
        lines += [f"{markdown(self.text)}: {scope(metrics)}, on {markdown(self.device)}.", ""]
        headings = ["", "original", "packed"] + ([f"original in {floor.dtype}"] if floor else [])
        rows = evaluation_rows(metrics, floor.metrics if floor else None)
        lines += markdown_table(headings, [*self._bit_rows(len(headings)), *rows])
        if self.tasks:
            lines += ["", "## Tasks", "", "Mean ± standard error, both models on the same samples.", ""]
            lines += markdown_table(TASK_HEADINGS, task_rows(self.tasks))
        versions = ", ".join(markdown(f"{name} {version}") for name, version in self.versions.items())
        lines += ["", "Made with", "", code_block(self.command, "bash"), "", f"and {versions}."]
        return "\n".join(lines) + "\n"

    def _bit_rows(self, columns: int) -> list[list[str]]:
        rows = []
        for label, bits in (
            ("bits per packed weight, counted on the files", self.bits_per_packed_weight),
            ("bits per parameter, whole files", self.bits_per_parameter),
        ):
            if bits is not None:
                rows.append([label, "", f"{bits:.3f}", ""][:columns])
        return rows


@contextmanager
def _complete() -> Iterator[None]:
    """Turn the errors of missing, unknown and misplaced fields into one that says so."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record is incomplete, {error}; create it with hf-pcdvq eval") from error


def evaluation_from(field: str, content: Any) -> Evaluation:
    """The metrics of a record, each of the type that an evaluation returns; whether they are plausible is not checked.

    Raises:
        ValueError: one is missing or has another type; the message names it.
    """
    with _complete():
        metrics = Evaluation(**content)
    for name, value in asdict(metrics).items():
        check = positive_integer if name in ("context_length", "windows", "predictions") else number
        check(f"{field}.{name}", value)
    return metrics


def _task_from(content: Any) -> TaskScore:
    task = TaskScore(**content)
    for name in ("task", "metric"):
        short_text(f"tasks.{name}", getattr(task, name))
    for name in ("original", "packed"):
        number(f"tasks.{name}", getattr(task, name))
    for name in ("original_stderr", "packed_stderr"):
        if getattr(task, name) is not None:
            number(f"tasks.{name}", getattr(task, name))
    positive_integer("tasks.samples", task.samples)
    if task.dataset is not None and hub_name(short_text("tasks.dataset", task.dataset, 200)) is None:
        raise ValueError(f"tasks.dataset must be a name on the Hub, got {task.dataset!r}")
    return task


def read_record(path: Path) -> EvaluationRecord:
    """Read a record from a file, or from a folder that contains `evaluation.json`.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the file is no record, is damaged, or has a newer format.
    """
    file = path / f"{NAME}.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; `hf-pcdvq eval` writes it")
    return read_json(file, EvaluationRecord.from_dict)


def check_record_folder(folder: Path, force: bool) -> None:
    """Reject a folder that is not writable, or, without `force`, already contains a record.

    Raises:
        FileExistsError: it contains a record.
        OSError: it is a file, or is not writable.
    """
    check_writable(folder)
    if (folder / f"{NAME}.json").exists() and not force:
        raise FileExistsError(f"{folder} has an {NAME}.json already; --force replaces it, --out writes elsewhere")


def count_bits(packed: str) -> tuple[float | None, float | None]:
    """Bits per packed weight and per parameter of a saved model, or of a model on the Hub that has been downloaded.

    Both are None if the model is not packed, or was quantized by another library.

    Raises:
        FileNotFoundError, ValueError: files are missing or damaged, see `count_folder`.
    """
    folder = Path(packed)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(packed, local_files_only=True))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (settings.get("quantization_config") or {}).get("quant_method") not in CONFIGS:
        return None, None
    count = count_folder(folder)
    return count.bits_per_packed_weight, count.bits_per_parameter


def hash_tokens(windows: Tensor) -> str:
    """SHA-256 of windows int64 `[n, L]` and their shape."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
