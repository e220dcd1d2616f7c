"""Tables for the terminal: sizes of a saved model, and figures of evaluations."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_pcdvq.evaluation.metrics import Evaluation
from hf_pcdvq.evaluation.tables import evaluation_rows, scope
from hf_pcdvq.files.size import FolderCount, layer_groups, readable_size
from hf_pcdvq.files.text import visible


def show(table: Table) -> None:
    """Print a table: on a terminal as wide as that, elsewhere as wide as its content, so that no name is broken."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
        if table.title is not None:
            console.print(table.title, markup=False)  # it would be broken at the width of the table
            table.title = None
    console.print(table)


def size_table(count: FolderCount) -> Table:
    """The sizes of the parts of a saved model, and its bits per weight."""
    table = Table(title=as_is(str(count.folder), "table.title"), title_justify="left", show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("size", justify="right", overflow="fold")
    table.add_row("method", count.config.describe() if count.config else "not packed")
    for pattern, setting in count.config.overrides.items() if count.config else ():
        table.add_row(as_is(f"  {pattern}"), setting or "as it was")
    table.add_row(f"packed layers ({len(count.layers)})", readable_size(count.packed_bytes))
    table.add_row("embeddings", readable_size(count.embedding_bytes) if count.embedding_bytes else "-")
    table.add_row("output head", readable_size(count.head_bytes) if count.head_bytes else "-")
    table.add_row("everything else", readable_size(count.other_bytes))
    table.add_row("headers", readable_size(count.header_bytes))
    table.add_row("safetensors files", readable_size(count.file_bytes), style="bold")
    table.add_row("parameters", f"{count.parameters:,}")
    if count.bits_per_packed_weight is not None:
        table.add_row("bits per packed weight", f"{count.bits_per_packed_weight:.3f}", style="bold")
    table.add_row("bits per parameter, whole files", f"{count.bits_per_parameter:.3f}", style="bold")
    return table


def layer_table(count: FolderCount) -> Table:
    """The packed layers, in one row those that only differ in their number."""
    table = Table(title="Packed layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("count", "outputs x inputs", "bits per weight", "size"):
        table.add_column(heading, justify="right")
    for (name, out_features, in_features, _), layers in layer_groups(count).items():
        size = readable_size(sum(layer.nbytes for layer in layers))
        bits = f"{layers[0].bits_per_weight:.3f}"
        table.add_row(
            as_is(name), str(sum(layer.experts for layer in layers)), f"{out_features} x {in_features}", bits, size
        )
    return table


def left_table(left_unpacked: dict[str, str]) -> Table:
    """Parameters that were not packed, and why."""
    table = Table(title="Left as they were", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("reason", overflow="fold")
    for name, reason in left_unpacked.items():
        table.add_row(as_is(name), as_is(reason))
    return table


def evaluation_table(result: Evaluation, floor: Evaluation | None = None, floor_name: str = "") -> Table:
    """The figures of a comparison, under the amount of text that they were measured on.

    Args:
        result: the packed model against the original.
        floor: the original against itself in another dtype, if that was measured.
        floor_name: heading of the column for `floor`.
    """
    table = Table("", title=scope(result), title_justify="left")
    for heading in ("original", "packed", floor_name) if floor else ("original", "packed"):
        table.add_column(as_is(heading), justify="right")
    for row in evaluation_rows(result, floor):
        table.add_row(*row)
    return table


def plain_table(headings: list[str], rows: list[list[str]], title: str) -> Table:
    """Rows of text under their headings."""
    table = Table(title=as_is(title, "table.title"), title_justify="left")
    for heading in headings:
        table.add_column(as_is(heading))
    for row in rows:
        table.add_row(*map(as_is, row))
    return table


def as_is(text: str, style: str = "") -> Text:
    """A text of a cell or title, without the markup of `rich` and what would steer the terminal."""
    return Text(visible(text), style)
