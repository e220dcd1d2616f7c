"""The console script `hf-pcdvq`: quantize a model, then inspect, measure, try and publish it.

It is a package of its own because `import hf_pcdvq` imports PyTorch and Transformers, and `--help` should not wait
for them. The commands import it, and everything else that is heavy, inside their functions.

Exit codes: 0 success, 1 an error (one message on stderr, the traceback with `--debug`), 2 wrong usage.
"""

from __future__ import annotations

import click

from .allocate import allocate
from .compare import compare
from .estimate import estimate
from .evaluate import evaluate_command
from .generate import generate
from .harness import lm_eval
from .import_wint2 import import_wint2_command
from .inspect import inspect
from .push import card, check, push
from .quantize import quantize
from .recover import recover_command
from .serve import chat, serve
from .speed import speed
from .tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf_pcdvq")
def main() -> None:
    """Language models at 2 to 3 bits per weight, for Hugging Face Transformers.

    MODEL is the folder of a saved model, or the name of a model on the Hugging Face Hub.

    \b
    Example: quantize a model, measure the result and publish it.
      hf-pcdvq quantize Qwen/Qwen3-0.6B --out qwen-2bit
      hf-pcdvq inspect qwen-2bit
      hf-pcdvq eval Qwen/Qwen3-0.6B qwen-2bit --text wiki.txt
      hf-pcdvq generate qwen-2bit --prompt "What is a codebook?"
      hf-pcdvq push qwen-2bit me/Qwen3-0.6B-2bit
    """


for command in (
    quantize,
    recover_command,
    allocate,
    estimate,
    inspect,
    evaluate_command,
    compare,
    generate,
    serve,
    chat,
    lm_eval,
    speed,
    tune,
    import_wint2_command,
    check,
    card,
    push,
):
    main.add_command(command)
