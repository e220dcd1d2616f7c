"""Damages the folder of a tiny packed model in thousands of ways, and prints a table of what became of them.

python tools/fuzz_checkpoints.py --cases 10000

Exits with 1 if a command ended in an unclear error, took longer than five seconds, or if `check` passed a wrong model.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

from damage import DAMAGE  # noqa: E402
from outcome import Outcome, make_folder, run_case  # noqa: E402

COLUMNS = [("check", "refused"), ("check", "passed")] + [
    ("load", found) for found in ("refused", "error of Transformers", "same", "different")
]


@click.command()
@click.option("--cases", default=10_000, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first case; it determines the damage.")
def main(cases: int, first: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hf_pcdvq-fuzz-") as temporary:
        intact = Path(temporary) / "intact"
        expected = make_folder(intact)
        outcomes = []
        for number in range(first, first + cases):
            outcomes.append(run_case(number, intact, expected, Path(temporary)))
            for fault in outcomes[-1].faults:
                click.echo(f"case {number}, {outcomes[-1].kind}: {fault}")
    click.echo(table(outcomes))
    sys.exit(any(outcome.faults for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table: a row per kind of damage, and how often each command did what."""
    lines = ["| damage | cases | " + " | ".join(f"{command}: {found}" for command, found in COLUMNS) + " | faults |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for kind in (*DAMAGE, "all"):
        rows = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = Counter((command, getattr(outcome, command)) for outcome in rows for command in ("check", "load"))
        faults = sum(bool(outcome.faults) for outcome in rows)
        cells = [kind, len(rows), *(counts[column] for column in COLUMNS), faults]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
