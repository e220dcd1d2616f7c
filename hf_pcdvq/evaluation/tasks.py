"""Standard data for evaluations: WikiText-2, and the tasks of lm-eval.

They need the packages of the extra `eval`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..files.provenance import hub_name
from ..quiet import quiet

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

WIKITEXT2 = "WikiText-2 test (Salesforce/wikitext, wikitext-2-raw-v1)"
WIKITEXT2_ON_HUB = {
    "dataset_type": "Salesforce/wikitext",
    "dataset_name": "WikiText-2",
    "dataset_config": "wikitext-2-raw-v1",
    "dataset_split": "test",
}


def wikitext2() -> str:
    """The WikiText-2 test text from the Hub, its rows joined by "\\n\\n" as in the literature.

    Raises:
        ImportError: the package `datasets` is not installed.
        OSError: the Hub cannot be reached, and the dataset is not in the cache.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("WikiText-2 needs the package datasets: pip install datasets") from error
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (OSError, ValueError) as error:
        raise OSError(
            f"WikiText-2 could not be downloaded from the Hub ({error}); pass a text file with --text"
        ) from error
    return "\n\n".join(rows["text"])


@dataclass(frozen=True)
class Score:
    """Mean of one metric of one task, its standard error (None if lm-eval reports none), number of samples, and name of
    the task's data set on the Hub (None if it is not there)."""

    mean: float
    stderr: float | None
    samples: int
    dataset: str | None = None


def task_manager(tasks: Sequence[str], folder: Path | None = None) -> TaskManager:
    """A manager of lm-eval's own tasks and those in a folder, which checks that the given ones exist.

    Args:
        tasks: names of tasks or groups.
        folder: YAML files of tasks, which take precedence over lm-eval's own of the same name.

    Raises:
        ImportError: the package `lm-eval` is not installed.
        ValueError: a task is unknown, or `tasks` is empty.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks need the package lm-eval: pip install lm-eval") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown) or 'without a name'}; "
            "`lm-eval ls tasks` lists its own, and --task-dir adds a folder of others"
        )
    return manager


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[tuple[str, str], Score]:
    """Scores of a model in lm-eval tasks by task and metric, zero-shot unless a task says otherwise.

    Args:
        model: a causal language model of Transformers, packed or not; it stays on its device.
        tokenizer: its tokenizer.
        tasks, manager: see `task_manager`.
        limit: use only the first `limit` samples of each task; None uses all.
        batch_size: sequences per batch.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quiet("lm_eval"):  # it warns about models passed as objects, and about its tasks' defaults
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, batch_size=batch_size
        )
    scores = {}
    for task, figures in found["results"].items():
        samples = _samples(task, found)
        for name, value in figures.items():
            metric, _, variant = name.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = metric if variant == "none" else f"{metric} ({variant})"
            error = _number(figures.get(f"{metric}_stderr,{variant}"))
            scores[task, label] = Score(float(value), error, samples, _dataset(task, found))
    return scores


def _dataset(task: str, found: dict[str, Any]) -> str | None:
    """The data set of a task on the Hub. Formats of local files, such as `json`, are no data sets."""
    path = found.get("configs", {}).get(task, {}).get("dataset_path")
    return hub_name(path) if isinstance(path, str) else None


def _samples(task: str, found: dict[str, Any]) -> int:
    """Number of samples of a task, or of all tasks in a group."""
    counts = found["n-samples"]
    if task in counts:
        return counts[task]["effective"]
    return sum(_samples(member, found) for member in found["group_subtasks"].get(task, ()))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
