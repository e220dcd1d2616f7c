"""The files beside a model's weights that quantizing does not change, and that saving model and tokenizer may not write."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

from .records import read_json

# Of models that read more than text. Feature extractors have the file of image processors.
PROCESSOR_FILES = (
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)
# A class in a module of the folder; one of another repository has its name and two dashes in front.
_REFERENCE = re.compile(r"(\w+\.)+\w+")


def copy_companions(source: str, folder: Path, config: PreTrainedConfig, revision: str | None = None) -> list[str]:
    """Complete a saved model with what the original has beside its weights: processor, generation config, chat template.

    They are copied rather than loaded, because loading a processor needs packages for images and sound that quantizing
    does not. Files that are in `folder` already are kept.

    Args:
        source: folder of the original, or its name on the Hub.
        folder: the saved model.
        config: the model's configuration.
        revision: branch, tag or commit on the Hub.

    Returns:
        What is missing nevertheless, a sentence each.
    """
    for name in (*PROCESSOR_FILES, GENERATION_CONFIG_NAME, CHAT_TEMPLATE_FILE):
        if not (folder / name).exists():
            file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                shutil.copyfile(file, folder / name)
    return missing_companions(folder, config)


def missing_companions(folder: Path, config: PreTrainedConfig) -> list[str]:
    """What a saved model lacks for images, video or sound, a sentence each."""
    missing = []
    processor = [name for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME) if (folder / name).is_file()]
    if type(config) in PROCESSOR_MAPPING and not processor:
        missing.append(
            f"the model has no processor, neither {PROCESSOR_NAME} nor {IMAGE_PROCESSOR_NAME}: save the original's beside it, "
            "AutoProcessor.from_pretrained(original).save_pretrained(folder)"
        )
    for name in processor:
        for module in sorted(local_modules(folder / name)):
            if not (folder / module).is_file():
                missing.append(f"{name} refers to code in {module}, which is not copied; copy it from the original")
    return missing


def local_modules(file: Path) -> set[str]:
    """The Python files, as paths in the folder, that `auto_map` of a JSON file beside them refers to.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    return read_json(file, _modules) if file.is_file() else set()


def _modules(settings: Any) -> set[str]:
    if not isinstance(settings, dict):
        raise ValueError(f"expected an object, found {type(settings).__name__}")
    references = filter(_REFERENCE.fullmatch, _strings(settings.get("auto_map")))
    return {f"{reference.rpartition('.')[0].replace('.', '/')}.py" for reference in references}


def _strings(value: Any) -> list[str]:
    """All strings in nested lists and dictionaries: an entry names one class, or several."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [string for entry in value for string in _strings(entry)]
    return [value] if isinstance(value, str) else []
