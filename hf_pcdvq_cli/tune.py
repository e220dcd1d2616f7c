"""`hf-pcdvq tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Command, note, progress_wanted, saved_folder

if TYPE_CHECKING:
    from hf_pcdvq_kernels.triton.launch_config import Shape


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--tokens",
    type=click.IntRange(1, 64),
    multiple=True,
    default=(1, 8, 16),
    show_default=True,
    help="Tokens that run at once: sequences in a batch; 2 to 8 run alike. May be repeated.",
)
@click.option("--device", help="cuda, cuda:1, xpu, ... [default: the accelerator]")
@click.option("--force", is_flag=True, help="Measure again what was measured before.")
def tune(model: str, tokens: tuple[int, ...], device: str | None, force: bool) -> None:
    """Measure on this GPU how to launch the kernels of the packed MODEL, which is run without it too.

    Takes some seconds for every size of layer. The result is kept in a file per kind of GPU, whose path is printed, and
    holds for all models with layers of these sizes; deleting it brings the defaults back. What is in the file is not
    measured again, so that a run that was interrupted goes on where it stopped.

    \b
    Example:
      hf-pcdvq tune qwen-2bit --tokens 1
    """
    import torch

    if device is None and not torch.accelerator.is_available():
        raise click.ClickException("launch configs are measured on a GPU, and PyTorch finds none here")
    where = torch.device(device) if device else torch.accelerator.current_accelerator()
    if where.type == "cpu":
        raise click.ClickException("--device cpu: launch configs are measured on a GPU")

    from hf_pcdvq_kernels.triton import tuned, tuning
    from rich.table import Table

    from hf_pcdvq.progress import progress_of

    from .tables import show

    shapes = _shapes(saved_folder(model), tokens)
    wanted = [shape for shape in shapes if force or shape not in tuned.measured(where)]
    note(f"{len(wanted)} products to measure, {len(shapes) - len(wanted)} measured before")
    table = Table("format", "tokens", "outputs", "inputs", "block_n", "num_warps", "split_k", "µs", "default µs")
    for shape, found in progress_of(
        tuning.tune(wanted, where), total=len(wanted), unit="product", desc="Tuning", shown=progress_wanted()
    ):
        times = f"{found.seconds * 1e6:.1f}", f"{found.default_seconds * 1e6:.1f}"
        sizes = (
            shape.tokens,
            shape.rows,
            shape.columns,
            found.config.block_n,
            found.config.num_warps,
            found.config.split_k,
        )
        table.add_row(shape.format, *map(str, sizes), *times)
    if wanted:
        show(table)
    click.echo(tuned.file_of(where))


def _shapes(folder: Path, tokens: tuple[int, ...]) -> list[Shape]:
    """The products of a packed model, each once."""
    from hf_pcdvq_kernels.triton.launch_config import Shape, tokens_per_program

    from hf_pcdvq.files.size import count_folder

    count = count_folder(folder)
    if not count.layers:
        raise ValueError(f"{folder} holds no packed layers; give the folder of a packed model")
    powers = sorted({tokens_per_program(number) for number in tokens})
    # What is measured is for single products, and experts are multiplied in groups.
    products = dict.fromkeys(
        (layer.codec.format, layer.out_features, layer.in_features)
        for layer in count.layers
        if layer.codec.has_kernels and layer.experts == 1
    )
    return [Shape(name, power, *size) for name, *size in products for power in powers]
