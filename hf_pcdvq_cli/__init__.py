"""The console script `hf-pcdvq`: quantize a model, look into a packed one, measure it, try it, publish it.

A package of its own, because importing `hf_pcdvq` imports PyTorch and Transformers, which `--help` should not wait for.
The commands import it, and whatever else is heavy, inside their functions.

Exit codes: 0 done, 1 an error (one message on stderr, the traceback with `--debug`), 2 wrong usage.
"""

from __future__ import annotations

import click

from .compare import compare
from .estimate import estimate
from .evaluate import evaluate_command
from .generate import generate
from .import_wint2 import import_wint2_command
from .inspect import inspect
from .push import card, check, push
from .quantize import quantize
from .speed import speed
from .tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf_pcdvq")
def main() -> None:
    """Language models at 2 to 3 bits per weight, for Hugging Face Transformers.

    MODEL is always a folder that holds a saved model, or the name of one on the Hugging Face Hub.

    \b
    Example, from a model to a small copy of it that has been measured:
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2bit
      hf-pcdvq inspect qwen-2bit
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --text wiki.txt
      hf-pcdvq generate qwen-2bit --prompt "What is a codebook?"
      hf-pcdvq push qwen-2bit me/Qwen3-0.6B-2bit
    """


for command in (
    quantize,
    estimate,
    inspect,
    evaluate_command,
    compare,
    generate,
    speed,
    tune,
    import_wint2_command,
    check,
    card,
    push,
):
    main.add_command(command)
