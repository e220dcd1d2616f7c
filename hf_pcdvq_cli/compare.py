"""`hf-pcdvq compare`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Command, echo_json, json_option, note


@click.command(cls=Command)
@click.argument("records", metavar="A B ...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default="comparison",
    show_default=True,
    help="Folder for comparison.md and comparison.png; existing ones are replaced.",
)
@json_option
def compare(records: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare evaluations in a table, and in a plot of quality against bits.

    A, B, ... are files that `hf-pcdvq eval` wrote, or folders of models that contain them. All must have been
    measured with the same text, context and windows.

    \b
    Example:
      hf-pcdvq compare qwen-2bit qwen-2.25bit other/evaluation.json --out comparison
    """
    from hf_pcdvq.evaluation.comparison import HEADINGS, NAME, Comparison, plot_quality, point_rows
    from hf_pcdvq.files.folders import check_writable
    from hf_pcdvq.files.records import write_text

    from .tables import plain_table, show

    check_writable(out)
    comparison = Comparison.read(records)
    task_headings, task_rows = comparison.task_table()
    if as_json:
        echo_json({name: record.to_dict() for name, record in comparison.records.items()})
    tables = [(HEADINGS, point_rows(comparison.points, comparison.originals), comparison.title)]
    if task_rows:
        tables.append((task_headings, task_rows, "Tasks"))
    for headings, rows, title in () if as_json else tables:
        show(plain_table(headings, rows, title))

    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{NAME}.md"]
    write_text(written[0], comparison.markdown())
    uncounted = [point.label for point in comparison.points if point.bits is None]
    if uncounted:
        note(f"Warning: not in the plot, because their bits were not counted: {', '.join(uncounted)}")
    if len(uncounted) < len(comparison.points):
        written.append(out / f"{NAME}.png")
        plot_quality(comparison.points, comparison.originals, comparison.title, written[1])
    note(f"Saved {' and '.join(map(str, written))}")
