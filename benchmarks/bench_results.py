"""The results of benchmarks/bench_kernels.py: their file, and the table, targets and plot made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_pcdvq_kernels import FORMATS

FORMAT = 1
DENSE = "bf16"


def check_setup(file: Path, recorded: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to add to results that were measured with something else.

    Raises:
        ValueError: an entry of `here` is recorded differently.
    """
    other = [f"{name} {recorded.get(name)}, here {here[name]}" for name in here if recorded.get(name) != here[name]]
    if other:
        raise ValueError(
            f"{file} was measured with {'; '.join(other)}, and rows of both do not mix. Give another --out to start a new "
            "file, or delete this one"
        )


class Layer(NamedTuple):
    """A layer size, and how many layers of this size a block of the model has."""

    model: str
    name: str
    outputs: int
    inputs: int
    per_block: int


LAYERS = (
    Layer("Llama-3-8B", "q/o", 4096, 4096, 2),
    Layer("Llama-3-8B", "k/v", 1024, 4096, 2),
    Layer("Llama-3-8B", "gate/up", 14336, 4096, 2),
    Layer("Llama-3-8B", "down", 4096, 14336, 1),
    Layer("Llama-3-70B", "q/o", 8192, 8192, 2),
    Layer("Llama-3-70B", "k/v", 1024, 8192, 2),
    Layer("Llama-3-70B", "gate/up", 28672, 8192, 2),
    Layer("Llama-3-70B", "down", 8192, 28672, 1),
    Layer("ERNIE-4.5-300B expert", "up_gate", 7168, 8192, 1),
    Layer("ERNIE-4.5-300B expert", "down", 8192, 3584, 1),
)
SMOKE_LAYERS = (Layer("smoke", "up", 256, 128, 2), Layer("smoke", "down", 128, 256, 1))

# Least speed on an H200, as a multiple of bf16's. Over the layers of a block, one token:
TARGET_MODEL = "Llama-3-70B"
TARGETS = {"pcdvq-2.0": 3.0, "pcdvq-2.25": 3.0, "ccq-2.5": 3.5, "stream-2.0": 2.5}
# ... and for each single layer, over a range of tokens:
LEAST = ((range(1, 65), 1.0), (range(2048, 2049), 0.8))


@dataclass(frozen=True)
class Row:
    """One product: a layer, a kind of weight and a number of tokens.

    Attributes:
        weight: "bf16", one of our formats, or the name of another project.
        nbytes: size of the weight.
        seconds: time per call; None if it failed.
        ratio: speed relative to bf16, which is measured right before.
        bytes_per_second: bytes of the weight, which is read once per call, over time.
        copy_share: `bytes_per_second` as a fraction of the rate of a copy within device memory.
        error: why it failed.
    """

    model: str
    layer: str
    outputs: int
    inputs: int
    per_block: int
    tokens: int
    weight: str
    nbytes: int | None = None
    seconds: float | None = None
    ratio: float | None = None
    bytes_per_second: float | None = None
    copy_share: float | None = None
    error: str | None = None

    @property
    def group(self) -> tuple[str, str, int]:
        """Key of the rows that are measured together."""
        return self.model, self.layer, self.tokens


@dataclass
class Results:
    """The content of a file of results.

    Attributes:
        setup: device, versions and launch configs; rows measured with different ones are not mixed.
        copy_rate: bytes per second, read and written together, of a copy within device memory.
        unavailable: for each other project that cannot run here the error.
    """

    setup: dict[str, str]
    copy_rate: float
    unavailable: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Results:
        """Raises ValueError, which names the file, if `write` did not write it."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"it is of format {content['format']!r}, not {FORMAT}")
            rows = [Row(**row) for row in content["rows"]]
            return cls(dict(content["setup"]), float(content["copy_rate"]), dict(content["unavailable"]), rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} does not hold results of bench_kernels.py ({type(error).__name__}: {error}); delete it, or "
                "give another --out"
            ) from None

    def write(self, file: Path) -> None:
        """Write the file whole or not at all."""
        content = {"format": FORMAT, "command": "python benchmarks/bench_kernels.py", **asdict(self)}
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def times(self, layer: Layer, tokens: int) -> dict[str, Row]:
        """The rows of a group that did not fail, by kind of weight."""
        group = (layer.model, layer.name, tokens)
        return {row.weight: row for row in self.rows if row.group == group and row.seconds is not None}

    def replace(self, rows: list[Row]) -> None:
        """Replace the rows of a group."""
        self.rows = [row for row in self.rows if row.group != rows[0].group] + rows

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers of the models that have rows."""
        models = {row.model for row in self.rows}
        return tuple(layer for layer in (*LAYERS, *SMOKE_LAYERS) if layer.model in models)

    def speedups(self, model: str) -> dict[str, dict[int, float]]:
        """For each kind of weight and number of tokens: the speed of all layers of a block relative to bf16.

        Only where all layers of the block were measured.
        """
        layers = [layer for layer in self.layers if layer.model == model]
        found: dict[str, dict[int, float]] = {}
        for tokens in sorted({row.tokens for row in self.rows}):
            groups = [(layer.per_block, self.times(layer, tokens)) for layer in layers]
            for weight in groups[0][1]:
                if all(weight in times and DENSE in times for _, times in groups):
                    dense, packed = (sum(n * times[w].seconds for n, times in groups) for w in (DENSE, weight))
                    found.setdefault(weight, {})[tokens] = dense / packed
        return found


def table(results: Results) -> str:
    """Speed relative to bf16 for each model, and the errors of what could not be measured."""
    lines = [", ".join(f"{name} {value}" for name, value in results.setup.items())]
    lines.append(f"copy rate {results.copy_rate / 1e12:.2f} TB/s, read and written")
    for model in dict.fromkeys(layer.model for layer in results.layers):
        speedups = results.speedups(model)
        tokens = sorted({number for speeds in speedups.values() for number in speeds})
        lines += ["", f"{model}: times as fast as bf16, over the layers of a block"]
        lines.append(
            f"{'tokens':<22}" + "".join(f"{number:>8}" for number in tokens) + "   share of copy rate, 1 token"
        )
        for weight, speeds in speedups.items():
            cells = (f"{speeds[number]:.2f}" if number in speeds else "" for number in tokens)
            lines.append(
                f"{weight:<22}" + "".join(f"{cell:>8}" for cell in cells) + f"   {_shares(results, model, weight)}"
            )
    for name, error in results.unavailable.items():
        lines.append(f"not measured: {name}: {error}")
    lines += [f"FAILED: {row.weight}, {row.group}: {row.error}" for row in results.rows if row.error is not None]
    return "\n".join(lines)


def _shares(results: Results, model: str, weight: str) -> str:
    """For each layer of a model, the share of the copy rate that it reaches with one token."""
    rows = [row for row in results.rows if (row.model, row.weight, row.tokens) == (model, weight, 1)]
    return "  ".join(f"{row.layer} {row.copy_share:.0%}" for row in rows if row.copy_share is not None)


def targets(results: Results) -> Iterator[tuple[str, float | None, float]]:
    """Yields for each target its description, the measured figure (None if there is none), and the least it should be."""
    speedups = results.speedups(TARGET_MODEL) if any(row.model == TARGET_MODEL for row in results.rows) else {}
    for weight, least in TARGETS.items():
        yield f"{weight}, 1 token, a block of {TARGET_MODEL}", speedups.get(weight, {}).get(1), least
    for tokens, least in LEAST:
        words = f"{tokens[0]} to {tokens[-1]} tokens" if len(tokens) > 1 else f"{tokens[0]} tokens"
        rows = [row for row in own_rows(results.rows) if row.tokens in tokens and row.ratio is not None]
        if not rows:
            yield f"every layer, {words}", None, least
            continue
        worst = min(rows, key=lambda row: row.ratio)
        where = f"{worst.weight}, {worst.model} {worst.layer}, {worst.tokens} tokens"
        yield f"every layer, {words}; slowest is {where}", worst.ratio, least


def own_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of our own formats."""
    return (row for row in rows if row.weight in FORMATS)


def target_lines(results: Results) -> str:
    """Whether each target is met, as text."""
    lines = [f"Targets, set for an H200; measured on {results.setup['device']}:"]
    for words, found, least in targets(results):
        verdict = "not measured" if found is None else "met" if found >= least else "MISSED"
        figure = "" if found is None else f"{found:.2f}, "
        lines.append(f"  {verdict:<13} {words}: {figure}target {least}")
    return "\n".join(lines)


def plot(results: Results, file: Path) -> None:
    """Plot speed relative to bf16 over the number of tokens, one panel per model. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(layer.model for layer in results.layers))
    figure = Figure(figsize=(5.2 * len(models) + 1.8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    names = dict.fromkeys(weight for model in models for weight in results.speedups(model) if weight != DENSE)
    own = {row.weight for row in own_rows(results.rows)}
    for panel, model in zip(panels, models):
        speedups = results.speedups(model)
        for number, name in enumerate(names):
            points = speedups.get(name, {})
            style = {"marker": "osD^vP*X"[number % 8], "linestyle": "-" if name in own else "--"}
            panel.plot([math.log2(tokens) for tokens in points], list(points.values()), label=name, **style)
        ticks = sorted({row.tokens for row in results.rows if row.model == model})
        panel.axhline(1, color="black", linewidth=1)
        panel.set_xticks([math.log2(tokens) for tokens in ticks], [str(tokens) for tokens in ticks])
        panel.set(title=model, xlabel="tokens")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="times as fast as bf16", ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Linear layers of a block on {results.setup['device']}, weights cold in cache")
    figure.savefig(file, dpi=110)
