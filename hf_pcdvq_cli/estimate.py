"""`hf-pcdvq estimate`."""

from __future__ import annotations

import click

from .common import (
    Command,
    echo_json,
    json_option,
    override_option,
    overrides_of,
    setting_option,
    skip_option,
    vocabulary_options,
)


@click.command(cls=Command)
@click.argument("model", metavar="CONFIG.json|MODEL")
@setting_option
@override_option
@vocabulary_options
@skip_option
@click.option(
    "--no-calibration",
    is_flag=True,
    help="Count what rounding packs: also what text does not reach, such as a tower for images.",
)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Tokens in the key-value cache that memory is estimated for.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That share the quantizing, each on a machine or GPU like this one.",
)
@json_option
def estimate(
    model: str,
    setting: str,
    override: tuple[str, ...],
    embeddings: str | None,
    head: str | None,
    skip: tuple[str, ...],
    no_calibration: bool,
    context: int,
    processes: int,
    as_json: bool,
) -> None:
    """Estimate the size of a packed model, and what it takes to make it, from its configuration alone.

    Only the configuration is downloaded, and no weights are allocated. How long it takes is worked out from a few seconds
    of measurements on this machine.

    \b
    Example:
      hf-pcdvq estimate Qwen/Qwen3-30B-A3B --setting stream-2.0 --override "self_attn=int8"
    """
    from hf_pcdvq.calibration.settings import Calibration
    from hf_pcdvq.config import config_of_setting
    from hf_pcdvq.estimate import effort_table, estimate_table, read_model_config
    from hf_pcdvq.estimate import estimate as run

    from .tables import left_table, show

    options = {"overrides": overrides_of(override), "modules_to_not_convert": list(skip) or None}
    # `hf-pcdvq quantize` calibrates if it is not told otherwise, and then leaves alone what text does not reach.
    calibration = None if no_calibration else Calibration()
    config = config_of_setting(setting, embeddings=embeddings, head=head, calibration=calibration, **options)
    result = run(read_model_config(model), config, context, timed=True, processes=processes)
    if as_json:
        echo_json({**result.to_dict(), "left_unpacked": config.left_unpacked})
        return
    if config.left_unpacked:
        show(left_table(config.left_unpacked))
    show(estimate_table(result))
    show(effort_table(result))
