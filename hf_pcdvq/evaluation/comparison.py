"""Several evaluations side by side: one table, and one plot of quality against bits counted on the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.text import markdown
from .record import EvaluationRecord, read_record
from .tables import markdown_table, scope

NAME = "comparison"
_MARKERS = "os^Dv"
FAR = 10  # times the original's perplexity: worse models are useless, and all lie on one line in the plot


@dataclass(frozen=True)
class Point:
    """One model in the table and the plot.

    Attributes:
        label: its name there.
        bits: bits per packed weight, counted on the files; None leaves the model out of the plot.
        perplexity, kl_mean, kl_p90, top1_agreement: see `Evaluation`.
        series: points of one series share a colour.
        group: points of one group share a marker.
    """

    label: str
    bits: float | None
    perplexity: float
    kl_mean: float
    kl_p90: float
    top1_agreement: float
    series: str = ""
    group: str = ""


@dataclass(frozen=True)
class Comparison:
    """Records by distinct names, all measured on the same tokens, against one original or several."""

    records: dict[str, EvaluationRecord]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Comparison:
        """Read records from files, or from folders that contain an `evaluation.json`.

        Raises:
            FileNotFoundError: a record is missing.
            ValueError: a record is damaged, or they were measured on different tokens.
        """
        records = [read_record(path) for path in paths]
        first = records[0]
        for path, record in zip(paths, records):
            if record.tokens != first.tokens:
                raise ValueError(
                    f"{paths[0]} and {path} were measured on different tokens and cannot be compared: "
                    f"{scope(first.metrics)} of {first.text}, and {scope(record.metrics)} of {record.text}; "
                    "evaluate both with the same --text, --context and --windows, and with the same tokenizer"
                )
        short = [Path(record.packed).name for record in records]
        names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths)]
        return cls(dict(zip(names, records)))

    @property
    def points(self) -> list[Point]:
        """The models by ascending bits, those without a count at the end."""
        points = []
        for name, record in self.records.items():
            result = record.metrics
            figures = (result.perplexity_packed, result.kl_mean, result.kl_p90, result.top1_agreement)
            points.append(Point(name, record.bits_per_packed_weight, *figures))
        return sorted(points, key=lambda point: (point.bits is None, point.bits, point.label))

    @property
    def originals(self) -> dict[str, float]:
        """Perplexity by the name of the original."""
        return {record.original: record.metrics.perplexity_original for record in self.records.values()}

    @property
    def title(self) -> str:
        """What all models were measured on."""
        record = next(iter(self.records.values()))
        return f"{record.text}: {scope(record.metrics)}"

    def task_table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows: one row per metric of a task, one column per model, the originals first."""
        scored = {name: record for name, record in self.records.items() if record.tasks}
        columns: dict[str, dict[tuple[str, str], str]] = {}
        for record in scored.values():
            columns.setdefault(f"original: {record.original}", {}).update(
                {(task.task, task.metric): f"{task.original:.4f}" for task in record.tasks}
            )
        for name, record in scored.items():
            columns[name] = {(task.task, task.metric): f"{task.packed:.4f}" for task in record.tasks}
        keys = dict.fromkeys(key for column in columns.values() for key in column)
        rows = [[*key, *(column.get(key, "") for column in columns.values())] for key in keys]
        return ["task", "metric", *columns], rows

    def markdown(self) -> str:
        """The tables, then the plot."""
        lines = ["# Comparison", "", markdown(self.title) + ".", ""]
        lines += markdown_table(HEADINGS, point_rows(self.points, self.originals))
        headings, rows = self.task_table()
        if rows:
            lines += ["", "## Tasks", "", *markdown_table(headings, rows)]
        if any(point.bits is not None for point in self.points):
            lines += ["", f"![Quality against bits]({NAME}.png)"]
        return "\n".join(lines) + "\n"


HEADINGS = ["model", "bits per packed weight", "perplexity", "KL mean", "KL 90 %", "top 1"]


def point_rows(points: Sequence[Point], originals: dict[str, float]) -> list[list[str]]:
    """The rows under `HEADINGS`, the originals first."""
    rows = [[f"original: {name}", "", f"{value:,.2f}", "", "", ""] for name, value in originals.items()]
    for point in points:
        bits = "not counted" if point.bits is None else f"{point.bits:.3f}"
        divergence = [f"{point.kl_mean:.3f}", f"{point.kl_p90:.3f}", f"{100 * point.top1_agreement:.1f} %"]
        rows.append([point.label, bits, f"{point.perplexity:,.2f}", *divergence])
    return rows


def plot_quality(points: Sequence[Point], originals: dict[str, float], title: str, file: Path) -> None:
    """Write a PNG: divergence and perplexity against bits per packed weight, every point labelled.

    A perplexity of more than `FAR` times the original's would squeeze all others together: it is drawn at that limit,
    with an arrow and its value.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no point has a count of its bits.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error

    points = [point for point in points if point.bits is not None]
    if not points:
        raise ValueError("no model has a count of its bits, so there is nothing to plot")
    # Without pyplot, whose backend and list of figures are global.
    figure = Figure(figsize=(10, 12), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    names = {
        upper: _draw(upper, points, "kl_mean", math.inf),
        lower: _draw(lower, points, "perplexity", FAR * max(originals.values())),
    }
    upper.set(ylabel="KL(original || packed), mean, nats", title=title)
    lower.set(ylabel="perplexity")
    for name, value in originals.items():
        lower.axhline(value, linestyle="--", color="gray", label=f"original: {Path(name).name}")
    lower.legend(fontsize="small")
    canvas.draw()  # places the axes, in which the labels are arranged
    for axes, places in names.items():
        _label(axes, places)
    figure.savefig(file, dpi="figure")


def _draw(axes, points: Sequence[Point], field: str, most: float) -> list[tuple[str, float, float]]:
    """Draw points on a logarithmic axis, those above `most` at that limit. Returns their labels and positions."""
    from matplotlib.ticker import LogLocator

    names = []
    colours = list(dict.fromkeys(point.series for point in points))
    groups = list(dict.fromkeys(point.group for point in points))
    for series, group in sorted({(point.series, point.group) for point in points}):
        members = [point for point in points if (point.series, point.group) == (series, group)]
        style = {"color": f"C{colours.index(series)}", "marker": _MARKERS[groups.index(group)], "linestyle": ""}
        bits = [point.bits for point in members]
        values = [getattr(point, field) for point in members]
        label = ": ".join(filter(None, (group, series))) or None
        axes.plot(bits, [min(value, most) for value in values], label=label, **style)
        far = [place for place, value in zip(bits, values) if value > most]
        axes.plot(far, [most] * len(far), marker="$\\uparrow$", color="white", linestyle="", markersize=4)
        for point, value in zip(members, values):
            name = f"{point.label}: {value:,.0f}" if value > most else point.label
            names.append((name, point.bits, min(value, most)))
    axes.set(xlabel="bits per packed weight, scales included, counted on the files", yscale="log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_minor_formatter("{x:,.10g}")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.1, y=0.1)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for the labels
    return names


def _label(axes, points: list[tuple[str, float, float]]) -> None:
    """Write labels beside the points, at the nearest position where they overlap no other label and no point."""
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([place for _, *place in points])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in places]  # in pixels
    for (name, *place), (x, y) in zip(points, places):
        measured = axes.text(*place, name, fontsize="x-small")
        width, height = measured.get_window_extent().size + 2
        measured.remove()
        # Right or left of the point, moving farther up and down.
        shifts = [
            (side, (sign * step - 1) * height / 2)
            for step in range(40)
            for side in (10, -10 - width)
            for sign in (1, -1)
        ]
        boxes = [(Bbox.from_bounds(x + right, y + up, width, height), right, up) for right, up in shifts]
        inside = (item for item in boxes if axes.bbox.containsx(item[0].x0) and axes.bbox.containsy(item[0].y1))
        free = (item for item in inside if not any(map(item[0].overlaps, taken)))
        box, right, up = next(free, boxes[0])
        taken.append(box)
        line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5, "relpos": (0 if right > 0 else 1, 0.5)}
        far = abs(up + height / 2) > height
        axes.annotate(
            name,
            place,
            (right, up),
            textcoords="offset pixels",
            va="bottom",
            fontsize="x-small",
            arrowprops=line if far else None,
        )
