"""Shared by the commands that choose bits by layer: their options, and how the result is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hf_pcdvq.allocation.report import Allocation
    from hf_pcdvq.calibration.report import QuantizationReport

Overrides = dict[str, str | None]


def target_options(command: Callable) -> Callable:
    """`--bits auto` and its targets."""
    for option in (
        click.option(
            "--target-size", metavar="SIZE", help="With --bits auto: the most bytes of the file, 1.2GB or 900MiB."
        ),
        click.option("--target-bits", type=float, help="With --bits auto: the most bits per packed weight, counted."),
        click.option(
            "--bits",
            type=click.Choice(["auto"]),
            help="Choose bits by layer among the rates of --setting's method, by what they do to the predictions.",
        ),
    ):
        command = option(command)
    return command


def target_fields(ctx: click.Context) -> dict[str, Any]:
    """The fields of a config that the options ask for; options that do not go together are wrong usage."""
    given = {
        name: ctx.params[name] for name in ("bits", "target_bits", "target_size") if ctx.params[name] is not None
    }
    if not given:
        return {}
    if given.keys() not in ({"bits", "target_bits"}, {"bits", "target_size"}):
        raise click.UsageError("--bits auto needs one of --target-bits and --target-size, and they need it", ctx)
    if ctx.params.get("no_calibration"):
        raise click.UsageError("--bits auto measures on the calibration text: leave out --no-calibration", ctx)
    return given


def given_allocation(ctx: click.Context) -> Allocation | None:
    """What `--allocation` names, if it is given; options that it takes the place of are wrong usage beside it."""
    from hf_pcdvq.allocation.report import Allocation

    if ctx.params["allocation"] is None:
        return None
    if ctx.params["bits"] is not None:
        raise click.UsageError("--allocation is what --bits auto found: give one of them", ctx)
    if ctx.get_parameter_source("setting") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--allocation says the setting of every layer: leave out --setting", ctx)
    return Allocation.read(ctx.params["allocation"])


def with_allocation(allocation: Allocation, overrides: Overrides) -> Overrides:
    """The overrides of the command line, then those of an allocation."""
    return {
        **overrides,
        **{pattern: setting for pattern, setting in allocation.overrides if pattern not in overrides},
    }


def show_allocation(report: QuantizationReport | None) -> None:
    """Print the bits by layer, if a run chose them."""
    if report is not None and report.allocation is not None:
        print_allocation(report.allocation)


def print_allocation(allocation: Allocation) -> None:
    from hf_pcdvq.allocation.report import SUMMARY_HEADINGS

    from .tables import plain_table, show

    rows = allocation.block_rows()
    show(
        plain_table(["block", *allocation.kinds], rows, "Setting, and KL of its group alone at the smallest setting")
    )
    show(plain_table(SUMMARY_HEADINGS, allocation.summary_rows(), f"Asked for: {allocation.target}"))
    click.echo(f"Kept: {allocation.kept}, because {allocation.reason}")
