"""`hf-pcdvq import-wint2`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from .common import Command, add_stub, echo_json, json_option, loader_stub_option, note

# Of the tokenizer, whose class may not be in Transformers, and the licence.
_COMPANIONS = (
    "tokenizer*.json",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)


@click.command("import-wint2", cls=Command)
@click.argument("source", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's config.json as Transformers reads it. [default: the one in DIR]",
)
@click.option("--force", is_flag=True, help="Replace the model in --out.")
@loader_stub_option
@json_option
def import_wint2_command(
    source: Path, out: Path, config_file: Path | None, force: bool, loader_stub: bool, as_json: bool
) -> None:
    """Convert a WINT2 checkpoint of FastDeploy (CCQ, as published for ERNIE-4.5) without requantizing it.

    Experts in WINT2 become packed experts, and floating-point tensors are kept as they are. Other types, such as
    4-bit experts and 8-bit dense layers, are refused.

    \b
    Example:
      hf-pcdvq import-wint2 ERNIE-4.5-300B-A47B-2Bits-Paddle --out ernie-2bit
    """
    from hf_pcdvq.estimate import read_model_config
    from hf_pcdvq.files.companions import copy_companions
    from hf_pcdvq.files.folders import folder_in_place
    from hf_pcdvq.files.size import count_folder
    from hf_pcdvq.importers.wint2 import import_wint2

    from .tables import show, size_table

    out = out.resolve()
    with folder_in_place(out, source, force) as folder:
        model_config = read_model_config(str(config_file)) if config_file else None
        unused = import_wint2(source, folder, model_config)
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                shutil.copy2(file, folder / file.name)
        for missing in copy_companions(str(source), folder, read_model_config(str(folder))):
            note(f"Warning: {missing}")
        if loader_stub:
            add_stub(folder)
    if unused:
        note(f"Warning: the model does not use {len(unused)} tensors of the checkpoint: {', '.join(unused[:8])} ...")
    count = count_folder(out)
    if as_json:
        echo_json(count.to_dict())
    else:
        show(size_table(count))
