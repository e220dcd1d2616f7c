"""What an allocation found and chose: `allocation.json`, the same as Markdown, and a plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from ..codecs import SETTINGS
from ..codecs.base import one_of
from ..files.records import package_versions, read_object, write_text
from ..files.text import markdown

logger = logging.getLogger(__name__)

NAME = "allocation"
FILES = (f"{NAME}.json", f"{NAME}.md", f"{NAME}.png")


@dataclass(frozen=True)
class GroupBits:
    """One group of layers.

    Attributes:
        block: number of its decoder block.
        kind: the names of its modules in the block.
        modules: their full names.
        weights: number of weights.
        sensitivity: mean KL(original || model) in nats with the error of the smallest setting in this group alone.
        proposed: the setting that the allocation chose.
        setting: the one that the model gets: the same, unless the uniform setting was kept.
        nbytes: bytes of `setting`, padding and companions included.
    """

    block: int
    kind: str
    modules: list[str]
    weights: int
    sensitivity: float
    proposed: str
    setting: str
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.block} {self.kind}"

    @property
    def bits(self) -> float:
        """Bits per weight, as counted on the file."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Measured:
    """A model that was quantized for comparison.

    Attributes:
        nbytes: bytes of all its packed layers.
        bits: per packed weight.
        kl: mean KL(original || this) in nats on the windows of the comparison; None if it was not measured.
    """

    nbytes: int
    bits: float
    kl: float | None


@dataclass(frozen=True)
class Allocation:
    """Bits by layer.

    Attributes:
        target: what was asked for, in words.
        limit: the most bytes that the packed layers may take for it.
        base: the uniform setting: the largest of the method that fits, the setting of all modules without an override.
        overrides: the settings of the others, as pairs of a pattern and the name of a setting.
        groups: all groups that bits were chosen for.
        errors: squared error per normal weight of every setting that could be chosen.
        uniform, mixed: the two models that were compared.
        kept: which of the two: `"uniform"` or `"mixed"`.
        reason: why.
        seconds: how long it took.
    """

    target: str
    limit: int
    base: str
    overrides: list[list[str]]
    groups: list[GroupBits]
    errors: dict[str, float]
    uniform: Measured
    mixed: Measured
    kept: str
    reason: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-clean."""
        return {**asdict(self), "versions": package_versions()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """From `to_dict`.

        Raises:
            ValueError: a field is missing, or is not what it should be.
        """
        try:
            own = {name: fields[name] for name in cls.__dataclass_fields__}
            own["groups"] = [GroupBits(**group) for group in own["groups"]]
            own["uniform"], own["mixed"] = Measured(**own["uniform"]), Measured(**own["mixed"])
            dict(own["overrides"])
            for group in own["groups"]:
                if not isinstance(group.modules, list) or not all(isinstance(name, str) for name in group.modules):
                    raise ValueError(f"modules of a group are not names but {group.modules!r}")
                one_of("setting", group.setting, tuple(SETTINGS))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no allocation of bits, or an incomplete one: {error!r}") from error
        return cls(**own)

    @classmethod
    def read(cls, file: Path) -> Self:
        """From `allocation.json`.

        Raises:
            ValueError: it is damaged; the message names it.
        """
        try:
            return cls.from_dict(read_object(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def write(self, folder: str | Path) -> None:
        """Write `allocation.json`, `.md` and, with matplotlib, `.png` into an existing folder."""
        folder = Path(folder)
        write_text(folder / f"{NAME}.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_text(folder / f"{NAME}.md", self.markdown())
        if find_spec("matplotlib") is None:
            logger.warning("no plot in %s: it needs matplotlib, pip install matplotlib", folder)
        else:
            plot_allocation(self, folder / f"{NAME}.png")

    @property
    def kinds(self) -> list[str]:
        """The kinds of groups, in the order in which they run."""
        return list(dict.fromkeys(group.kind for group in self.groups))

    def block_rows(self) -> list[list[str]]:
        """A row per decoder block, with its number and for every kind the setting and the sensitivity."""
        cells = {(group.block, group.kind): f"{group.setting} ({group.sensitivity:.4f})" for group in self.groups}
        blocks = dict.fromkeys(group.block for group in self.groups)
        return [[str(block), *(cells.get((block, kind), "") for kind in self.kinds)] for block in blocks]

    def summary_rows(self) -> list[list[str]]:
        """What was compared: name, bytes, bits and KL of each."""
        pairs = ((f"uniform, {self.base}", self.uniform), ("mixed", self.mixed))
        return [
            [name, f"{found.nbytes:,}", f"{found.bits:.3f}", "-" if found.kl is None else f"{found.kl:.4f}"]
            for name, found in pairs
        ]

    def markdown(self) -> str:
        """The report as text and tables."""
        lines = [
            "# Allocation of bits",
            "",
            f"Asked for: {self.target}. Kept: **{self.kept}**, because {self.reason}.",
        ]
        lines += ["", *_table(SUMMARY_HEADINGS, self.summary_rows()), "", "## Setting (and sensitivity) by block", ""]
        lines += _table(["block", *self.kinds], self.block_rows())
        lines += [
            "",
            "Sensitivity is the mean KL(original \\|\\| model) in nats with the error of the smallest setting in",
        ]
        lines += [
            "these layers alone; that of another setting is estimated from its squared error on normal weights:",
            "",
            *_table(["setting", "squared error"], [[name, f"{error:.4f}"] for name, error in self.errors.items()]),
        ]
        return "\n".join(lines) + "\n"


SUMMARY_HEADINGS = ["model", "packed bytes", "bits per packed weight", "KL mean"]


def _table(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(markdown, headings))} |", f"|{'---|' * len(headings)}"]
    return lines + [f"| {' | '.join(map(markdown, row))} |" for row in rows]


def plot_allocation(allocation: Allocation, file: Path) -> None:
    """A PNG: sensitivity of the groups above their bits per weight, by depth in the model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, whose backend and list of figures are global.
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, kind in enumerate(allocation.kinds):
        groups = [group for group in allocation.groups if group.kind == kind]
        blocks = [group.block for group in groups]
        upper.plot(blocks, [max(group.sensitivity, 1e-7) for group in groups], marker=".", label=kind)
        shift = (number - (len(allocation.kinds) - 1) / 2) * 0.12  # beside each other where they are equal
        lower.plot([block + shift for block in blocks], [group.bits for group in groups], ".", markersize=7)
    upper.set(ylabel="KL of this group alone, nats", yscale="log")
    upper.set_title("Sensitivity: the error of the smallest setting in one group of layers")
    upper.legend(fontsize="small", ncols=3)
    lower.set(ylabel="bits per weight, counted", xlabel="decoder block")
    lower.set_title(f"Bits by layer, for {allocation.target}; kept: {allocation.kept}")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
