"""Which files of a folder are published: those that a model needs, by name, and nothing else that lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import (
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from ..allocation.report import FILES as ALLOCATION
from ..calibration.report import NAME as REPORT
from ..evaluation.record import NAME as EVALUATION
from ..evaluation.speed import NAME as SPEED
from ..files.companions import PROCESSOR_FILES, local_modules
from ..files.headers import checkpoint_files
from ..files.provenance import NAME as PROVENANCE

CARD = "README.md"
MEASUREMENTS = [
    f"{REPORT}.json",
    f"{REPORT}.md",
    f"{REPORT}.png",
    f"{EVALUATION}.json",
    f"{EVALUATION}.md",
    f"{SPEED}.json",
    *ALLOCATION,
]
_SETTINGS = [CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_FILE, *PROCESSOR_FILES]
_TOKENIZER = [FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE]
_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?")


def select_files(
    folder: Path, include: Sequence[str] = (), trust_remote_code: bool = False
) -> tuple[list[str], list[str]]:
    """Choose the files to publish.

    Args:
        folder: a saved model.
        include: further files, by their paths in the folder.
        trust_remote_code: run Python code that comes with the tokenizer, to learn the names of its files.

    Returns:
        The chosen files and all others, as sorted paths in the folder with forward slashes.

    Raises:
        FileNotFoundError: a file of `include` does not exist.
        ValueError: a chosen file is a link to one that is not chosen, or outside the folder.
    """
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    absent = [name for name in include if name not in present]
    if absent:
        raise FileNotFoundError(
            f"{folder} has no file {absent[0]!r} to include; give paths as they are in the folder"
        )
    needed = {
        CARD,
        PROVENANCE,
        *MEASUREMENTS,
        *_SETTINGS,
        *_TOKENIZER,
        SAFE_WEIGHTS_INDEX_NAME,
        *(file.relative_to(folder).as_posix() for file in checkpoint_files(folder)),
        *_vocabulary_files(folder, trust_remote_code),
        *_code_files(folder),
        *include,
    }
    needed |= {name for name in present if _LEGAL.fullmatch(name)}
    needed |= {path.relative_to(folder).as_posix() for path in (folder / CHAT_TEMPLATE_DIR).glob("*.jinja")}
    chosen = sorted(present & needed)
    _check_links(folder, chosen)
    return chosen, sorted(present - needed)


def _vocabulary_files(folder: Path, trust_remote_code: bool) -> Iterable[str]:
    """What the tokenizer's class says that its files are called."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code).vocab_files_names.values()


def _code_files(folder: Path) -> set[str]:
    """The modules that `auto_map` entries name, and those that they import from beside them."""
    named = {folder / module for name in _SETTINGS for module in local_modules(folder / name)}
    existing = [file for file in named if file.is_file()]
    imported = {Path(file) for module in existing for file in get_relative_import_files(module)}
    return {file.relative_to(folder).as_posix() for file in {*existing, *imported}}


def _check_links(folder: Path, chosen: list[str]) -> None:
    """Refuse links through which something else would be published under the name of a model's file."""
    root = folder.resolve()
    places = {root / name for name in chosen}
    for name in chosen:
        target = (folder / name).resolve()
        if target not in places:
            raise ValueError(
                f"{folder / name} is a link to {target}, which is not one of the model's files in this folder. "
                "Put a copy in its place, or remove it"
            )
