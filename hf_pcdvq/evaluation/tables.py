"""The figures of an evaluation as table cells, and tables in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.text import markdown

if TYPE_CHECKING:
    from .metrics import Evaluation
    from .record import TaskScore

TASK_HEADINGS = ["task", "metric", "original", "packed", "samples"]


def task_rows(tasks: list[TaskScore]) -> list[list[str]]:
    """The rows of a table of tasks, under `TASK_HEADINGS`."""
    return [
        [
            task.task,
            task.metric,
            _with_error(task.original, task.original_stderr),
            _with_error(task.packed, task.packed_stderr),
            str(task.samples),
        ]
        for task in tasks
    ]


def _with_error(mean: float, error: float | None) -> str:
    places = 4 if mean < 10 else 2  # shares, or perplexities
    return f"{mean:,.{places}f}" if error is None else f"{mean:,.{places}f} ± {error:,.{places}f}"


def evaluation_rows(result: Evaluation, floor: Evaluation | None = None) -> list[list[str]]:
    """The rows of a comparison: label, original, packed model, and with `floor` the original in another dtype."""
    rows = [["perplexity", f"{result.perplexity_original:,.3f}"]]
    rows += [["KL(original || packed), mean", ""], ["KL, median", ""], ["KL, 90 %", ""], ["KL, 99 %", ""]]
    rows += [["same likeliest token", ""]]
    for column in (result, floor) if floor else (result,):
        divergences = (column.kl_mean, column.kl_median, column.kl_p90, column.kl_p99)
        figures = [f"{column.perplexity_packed:,.3f}", *(f"{value:.5f} nats" for value in divergences)]
        for row, figure in zip(rows, [*figures, f"{100 * column.top1_agreement:.2f} %"]):
            row.append(figure)
    return rows


def scope(metrics: Evaluation) -> str:
    """The amount of text that the figures were measured on."""
    return f"{metrics.windows} windows of {metrics.context_length} tokens, {metrics.predictions:,} predictions"


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, in whose cells nothing is formatting, a link or HTML."""
    cells = [[markdown(cell) for cell in row] for row in [headings, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:]]
