"""The results of benchmarks/bench_cpu.py: their file, and the table, targets and plot made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_results import check_setup
from rich.table import Table

from hf_pcdvq.files.records import write_text
from hf_pcdvq.files.size import readable_size

FORMAT = 1
DENSE, PLAIN = "bf16", "bf16 without oneDNN"
MEMORY_LIMIT = 150 << 20  # bytes beyond those of the model's files
KL_LIMIT = 0.002
Row = dict[str, Any]

# What a row is about; rows that agree in these replace each other.
KEYS = ("part", "threads", "instructions", "model", "layer", "tokens", "weight")

# Least speed on two threads, as a multiple of bf16's: single layers by the number of tokens, then whole models.
LAYERS = {1: {"pcdvq-2.25": 2.0, "stream-2.0": 3.0, "ccq-2.5": 2.5}}
GENERATE = {"pcdvq-2.25": 2.0, "stream-2.0": 2.5}
SEVERAL_TOKENS, PREFILL, SMALL_MODEL, AVX2, LLAMA = 1.0, 0.7, 1.2, 1.2, 1.0
NUMBA = 1.3  # below, Numba would be preferred
SMALL, LARGEST = "SmolLM2-135M", "3B"


class Results:
    """The content of a file of results, which is written after every row.

    Args:
        file: where it is, or will be.
        setup: machine and versions; rows measured with different ones are not mixed.

    Attributes:
        rows: what was measured.
    """

    def __init__(self, file: Path, setup: dict[str, Any]):
        self.file, self.setup = file, setup
        self.rows: list[Row] = []

    @classmethod
    def read(cls, file: Path) -> Results:
        """Raises ValueError, which names the file, if it does not hold such results."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"it is of format {content['format']!r}, not {FORMAT}")
            results = cls(file, dict(content["setup"]))
            results.rows = [{key: row[key] for key in KEYS} | row for row in content["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} does not hold results of bench_cpu.py ({type(error).__name__}: {error}); delete it, or give "
                "another --out"
            ) from None
        return results

    @classmethod
    def opened(cls, file: Path, setup: dict[str, Any]) -> Results:
        """The results in a file, or empty ones if it does not exist.

        Raises:
            ValueError: the file is not one of results, or was measured on another machine or with other versions.
        """
        if not file.is_file():
            return cls(file, setup)
        results = cls.read(file)
        check_setup(file, results.setup, setup)
        return results

    def has(self, **about: Any) -> bool:
        """Whether there is a row about this, a value for each of `KEYS` that matters."""
        return any(_about(row) == _about(about) and "error" not in row for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a row, or replace the one about the same, and write the file."""
        row = _about(row) | row
        self.rows = [other for other in self.rows if _about(other) != _about(row)] + [row]
        content = {
            "format": FORMAT,
            "command": "python benchmarks/bench_cpu.py",
            "setup": self.setup,
            "rows": self.rows,
        }
        write_text(self.file, json.dumps(content, indent=1) + "\n")
        print(line(row), flush=True)


def _about(row: Row) -> Row:
    return {key: row.get(key) for key in KEYS}


def subject(row: Row) -> str:
    """What a row is about, in words."""
    parts = (row["part"], row["model"], row["layer"], tokens_of(row), row["weight"])
    return ", ".join(part for part in parts if part)


def tokens_of(row: Row) -> str:
    """The number of tokens, in words."""
    number = row["tokens"]
    return "" if number is None else f"{number} token{'s' if number > 1 else ''}"


def where(row: Row) -> str:
    """What a row was measured with."""
    return f"{_threads(row['threads'])}, {row['instructions']}"


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def figures(row: Row) -> str:
    """What was measured, in words."""
    if "error" in row:
        return f"FAILED: {row['error']}"
    if row["part"] == "memory":
        sizes = (readable_size(row[key]) for key in ("resident_bytes", "file_bytes", "imported_bytes"))
        return "{} resident, {} in files, {} before loading".format(*sizes)
    if row["part"] == "quality":
        return f"KL {row['kl_mean']:.1e}, the same top token in {row['top1_agreement']:.2%}"
    if row["part"] == "overhead":
        return f"{row['seconds'] * 1e6:.1f} µs a call, nn.Linear {row['against_seconds'] * 1e6:.1f} µs"
    return f"{row['ratio']:.2f} times {row['against']}; {_speed(row, '')}, {row['against']} {_speed(row, 'against_')}"


def _speed(row: Row, prefix: str) -> str:
    seconds = row[f"{prefix}seconds"]
    if row["part"] in ("generate", "llama"):
        return f"{row['new_tokens'] / seconds:.1f} tokens/s"
    return f"{seconds * 1e3:.3f} ms"


def line(row: Row) -> str:
    """A row in one line."""
    return f"{subject(row)}; {where(row)}: {figures(row)}"


def least(row: Row) -> float | None:
    """The least ratio that is wanted of a row; None if there is no target."""
    part, weight = row["part"], row["weight"]
    if row["instructions"] == "avx2":
        return AVX2 if part == "generate" and row["model"] == LARGEST else None
    if part == "layer" and weight == PLAIN:
        return None
    if part == "layer":
        if row["tokens"] == 1:
            return LAYERS[1].get(weight)
        return SEVERAL_TOKENS if row["tokens"] <= 16 else PREFILL
    if part == "generate":
        return SMALL_MODEL if row["model"] == SMALL else GENERATE.get(weight)
    return {"prefill": PREFILL, "llama": LLAMA, "numba": NUMBA}.get(part)


def verdict(row: Row) -> str:
    """Whether the target of a row is met, as text."""
    if "error" in row:
        return "FAILED"
    if row["part"] == "memory":
        own = row["resident_bytes"] - row["imported_bytes"]
        return _verdict(own <= row["file_bytes"] + MEMORY_LIMIT, "files + 150 MB, beyond what was resident before")
    if row["part"] == "quality":
        return _verdict(row["kl_mean"] < KL_LIMIT, f"< {KL_LIMIT}")
    if row["part"] == "overhead":
        return _verdict(row["seconds"] < 15e-6, "< 15 µs")
    wanted = least(row)
    return "" if wanted is None else _verdict(row["ratio"] >= wanted, f">= {wanted}")


def _verdict(met: bool, target: str) -> str:
    return f"{'met' if met else 'MISSED'}, {target}"


def table(rows: Iterable[Row], setup: dict[str, Any]) -> Table:
    made = Table(title=", ".join(f"{key} {value}" for key, value in setup.items()), title_justify="left")
    for name in ("what", "with", "measured", "target for 2 threads"):
        made.add_column(name)
    for row in sorted(rows, key=where):
        made.add_row(subject(row), where(row), figures(row), verdict(row))
    return made


def markdown(rows: Iterable[Row]) -> str:
    """Tables for documents: for every part how many times as fast, by what is measured and kind of weight."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if "ratio" in row and row["part"] != "llama":
            grid = found.setdefault(f"{row['part']}, {where(row)}", {})
            name = ", ".join(part for part in (row["layer"] or row["model"], tokens_of(row)) if part)
            cells = grid.setdefault(name, {})
            cells[row["weight"]] = f"{row['ratio']:.2f}"
            if row["part"] == "generate":
                cells[row["weight"]] += f" ({_speed(row, '')}, {row['against']} {_speed(row, 'against_')})"
    return "\n".join(_markdown_table(title, grid) for title, grid in found.items())


def _markdown_table(title: str, grid: dict[str, dict[str, str]]) -> str:
    weights = list(dict.fromkeys(weight for cells in grid.values() for weight in cells))
    lines = [[title, *weights], ["---"] * (len(weights) + 1)]
    lines += [[name, *(cells.get(weight, "") for weight in weights)] for name, cells in grid.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(results: Results, file: Path) -> bool:
    """Plot speed relative to bf16: layers with one token, and generation, with the most threads measured.

    Returns whether there was anything to plot. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "linear layers, 1 token": lambda row: row["part"] == "layer" and row["tokens"] == 1,
        "generation, 1 sequence": lambda row: row["part"] == "generate",
    }
    measured = [row for row in results.rows if "ratio" in row and row["instructions"] != "avx2"]
    threads = max((row["threads"] for row in measured), default=0)
    chosen = {
        title: [row for row in measured if row["threads"] == threads and is_in(row)]
        for title, is_in in panels.items()
    }
    chosen = {title: rows for title, rows in chosen.items() if rows}
    if not chosen:
        return False
    figure = Figure(figsize=(6 * len(chosen), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, rows) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        _bars(panel, rows)
        panel.set(title=title, ylabel="times as fast as bf16")
    figure.suptitle(f"{results.setup['machine']}, {_threads(threads)}")
    figure.savefig(file, dpi=110)
    return True


def _bars(panel: Any, rows: list[Row]) -> None:
    """For each layer or model a group of bars, one for each kind of weight."""
    groups = list(dict.fromkeys(row["layer"] or row["model"] for row in rows))
    weights = list(dict.fromkeys(row["weight"] for row in rows))
    width = 0.8 / len(weights)
    for number, weight in enumerate(weights):
        points = {groups.index(row["layer"] or row["model"]): row["ratio"] for row in rows if row["weight"] == weight}
        places = [group - 0.4 + (number + 0.5) * width for group in points]
        panel.bar(places, list(points.values()), width, label=weight)
    panel.axhline(1, color="black", linewidth=1)
    panel.set_xticks(range(len(groups)), groups)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))
