"""The record of an evaluation: `evaluation.json`, which model cards and comparisons are made from, and the same as Markdown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CONFIGS
from ..files.folders import check_writable
from ..files.records import known_fields, read_json, write_text
from ..files.size import count_folder
from .metrics import Evaluation
from .tables import TASK_HEADINGS, evaluation_rows, markdown_table, scope, task_rows

NAME = "evaluation"
FORMAT = 1


@dataclass(frozen=True)
class NoiseFloor:
    """The original against itself in another dtype: a divergence below this one says nothing about the packed model.

    Attributes:
        dtype: what the original was loaded in as the second of the two, such as `"float32"`.
        metrics: the comparison, in which "packed" stands for the original in `dtype`.
    """

    dtype: str
    metrics: Evaluation


@dataclass(frozen=True)
class TaskScore:
    """One metric of one lm-eval task, of both models on the same samples.

    Attributes:
        task, metric: names as lm-eval prints them, such as `"piqa"` and `"acc_norm"`.
        original, packed: the metric's mean over the samples.
        original_stderr, packed_stderr: its standard error; None where lm-eval knows none.
        samples: number of them.
    """

    task: str
    metric: str
    original: float
    original_stderr: float | None
    packed: float
    packed_stderr: float | None
    samples: int


@dataclass(frozen=True)
class EvaluationRecord:
    """What was measured, on what, and with what.

    Attributes:
        original, packed: folders or names on the Hub.
        text: what the windows were cut from.
        tokens: hash of the windows' token ids; records with the same hash were measured on the same predictions.
        metrics: packed model against the original.
        noise_floor, tasks: None where they were not asked for.
        bits_per_packed_weight: counted on the packed model's files; None if it has no packed layers of ours.
        bits_per_parameter: the same over the whole files; None if they could not be counted.
        device: name of what the packed model ran on.
        versions: of the packages that took part.
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

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationRecord:
        """The record that `to_dict` wrote; fields that it does not know are passed over.

        Raises:
            ValueError: it is of another format, or is no such record.
        """
        known = known_fields(cls, content, FORMAT)
        try:
            known["metrics"] = Evaluation(**known["metrics"])
            floor = known["noise_floor"]
            known["noise_floor"] = floor and NoiseFloor(floor["dtype"], Evaluation(**floor["metrics"]))
            known["tasks"] = known["tasks"] and [TaskScore(**task) for task in known["tasks"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a whole record, {error}; write it with hf-pcdvq eval") from error
        return cls(**known)

    def write(self, folder: Path) -> None:
        """Write `evaluation.json` and `evaluation.md`; each appears whole or not at all."""
        write_text(folder / f"{NAME}.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_text(folder / f"{NAME}.md", self.markdown())

    def markdown(self) -> str:
        """The figures as tables."""
        lines = ["# Evaluation", "", f"`{self.packed}` against `{self.original}`.", ""]
        metrics, floor = self.metrics, self.noise_floor
        lines += [f"{self.text}: {scope(metrics)}, on {self.device}.", ""]
        headings = ["", "original", "packed"] + ([f"original in {floor.dtype}"] if floor else [])
        rows = evaluation_rows(metrics, floor.metrics if floor else None)
        lines += markdown_table(headings, [*self._bit_rows(len(headings)), *rows])
        if self.tasks:
            lines += ["", "## Tasks", "", "Mean ± standard error, both models on the same samples.", ""]
            lines += markdown_table(TASK_HEADINGS, task_rows(self.tasks))
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines += ["", "Made with", "", "```bash", self.command, "```", "", f"and {versions}."]
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


def read_record(path: Path) -> EvaluationRecord:
    """The record in a file, or in a folder that holds `evaluation.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else, damaged, or of a newer format.
    """
    file = path / f"{NAME}.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; `hf-pcdvq eval` writes it")
    return read_json(file, EvaluationRecord.from_dict)


def check_record_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that cannot take a record, or, without `force`, holds one.

    Raises:
        FileExistsError: it holds a record.
        OSError: it is a file, or may not be written to.
    """
    check_writable(folder)
    if (folder / f"{NAME}.json").exists() and not force:
        raise FileExistsError(f"{folder} holds {NAME}.json already; --force replaces it, --out writes elsewhere")


def count_bits(packed: str) -> tuple[float | None, float | None]:
    """Bits per packed weight and per parameter of a folder, or of a model on the Hub that has been downloaded.

    None for a model that is not packed, or in a format of another project.

    Raises:
        FileNotFoundError, ValueError: the files are incomplete or damaged, see `count_folder`.
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
    """SHA-256 of windows int64 `[n, L]`, shape included."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
