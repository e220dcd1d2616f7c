"""Integrity of a saved packed model: every tensor that its config requires, unchanged since it was saved, and a
matching tokenizer.

All files are read, but the model is not built: their content is compared with the hashes that saving put into them.
Files that another program saved have none; then only what is visible in shapes and values is found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform, revert_weight_conversion
from transformers.quantizers.auto import get_hf_quantizer

from ..files.headers import INDEX, checkpoint_files, read_index
from ..files.packing import PackedFiles, config_hashes
from ..files.records import read_object
from ..files.size import FolderCount, count_folder
from .architecture import architecture_of

logger = logging.getLogger(__name__)


def check_folder(folder: Path, trust_remote_code: bool = False) -> FolderCount:
    """Check a packed model that was saved with `save_pretrained`, without building it.

    Args:
        folder: the saved model.
        trust_remote_code: run Python code that comes with the model if its architecture is not in Transformers.

    Returns:
        The result of `count_folder`.

    Raises:
        FileNotFoundError: config.json, a shard or the tokenizer is missing.
        ValueError: the model is not packed, or the folder contradicts its config: a tensor is missing, unexpected, of
            the wrong shape or dtype, was changed since it was saved, holds NaN, or its file is truncated; or config.json
            was changed. The message names it.
    """
    count = count_folder(folder)
    if count.config is None:
        raise ValueError(
            f"{folder} is not packed: its config.json has no quantization_config. Quantize the model first"
        )
    if not count.layers:
        raise ValueError(f"{folder} has a quantization_config, but none of its layers is packed")
    files = checkpoint_files(folder)
    strays = sorted(set(folder.glob("*.safetensors")) - set(files))
    if strays:
        raise ValueError(
            f"{strays[0]} does not belong to the model: no index lists it. It was left by another model; delete it"
        )
    contents = PackedFiles.read(files, count.config)
    if contents.record is None:
        logger.warning(
            "%s was saved by another program than hf_pcdvq: it holds no hashes, so changed bytes cannot be found",
            folder,
        )
    _check_config(folder, contents)
    _check_names(folder, files, contents, trust_remote_code)
    _check_index(folder, contents)
    _check_values(count, contents)
    _check_tokenizer(folder, trust_remote_code)
    generation = folder / "generation_config.json"
    if generation.is_file():
        _by_transformers(generation, lambda: GenerationConfig.from_pretrained(folder))
    return count


def _check_index(folder: Path, contents: PackedFiles) -> None:
    for name, file in read_index(folder / INDEX).items():
        found = contents.tensors.get(name)
        if found is None or found.file.name != file:
            raise ValueError(f"{folder / INDEX}: {name} is not in {file}, where the index says it is")


def _check_config(folder: Path, contents: PackedFiles) -> None:
    """Compare config.json with the one that was saved with the weights."""
    if contents.record is None:
        return
    file = folder / "config.json"
    found, saved = config_hashes(read_object(file)), contents.record.config
    changed = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
    if changed:
        raise ValueError(
            f"{file}: {', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''} changed after the weights were saved. If "
            "that is intended, load the model and save it again"
        )


def _check_names(folder: Path, files: list[Path], contents: PackedFiles, trust_remote_code: bool) -> None:
    """Compare the files with those that `save_pretrained` would write for this model, and with their hashes."""
    model = _empty_model(folder, files, contents, trust_remote_code)
    state = model.state_dict()
    expected = revert_weight_conversion(model, state)
    stored = contents.tensors
    prefix = f"{model.base_model_prefix}."
    # Under the names of the files, which may not be those of the modules.
    tied = revert_weight_conversion(
        model, {name: state[name] for name in model.all_tied_weights_keys if name in state}
    )
    missing = [name for name in expected if name not in stored and name not in tied]
    if missing:
        raise ValueError(f"{folder} lacks {_first(missing)}, which its config.json requires")
    left_over = [name for name in stored if name not in expected and name.removeprefix(prefix) not in expected]
    if left_over:
        raise ValueError(f"{folder} contains {_first(left_over)}, which its config.json does not account for")
    for name, tensor in expected.items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise ValueError(
                f"{stored[name].file}: {name} has the shape {list(stored[name].shape)}, but config.json requires "
                f"{list(tensor.shape)}. They do not belong together"
            )


def _empty_model(folder: Path, files: list[Path], contents: PackedFiles, trust_remote_code: bool) -> Any:
    """The model on the meta device, with packed layers and no weights. Its quantizer checks the hashes of the files."""
    config = _model_config(folder, trust_remote_code)
    architecture = architecture_of(config, folder / "config.json")

    def build() -> Any:
        with torch.device("meta"):
            if architecture is not None:
                return architecture(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    model = _by_transformers(folder / "config.json", build)
    quantizer, *_ = get_hf_quantizer(config, None, None, weights_only=True, user_agent={})
    paths = [str(file) for file in files]
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=paths)
    model._weight_conversions = [
        entry for entry in get_model_conversion_mapping(model, add_legacy=False) if _applies(entry, contents)
    ]
    quantizer._settle_conversions(model)  # as after loading: packed experts are saved as stacks
    return model


def _applies(conversion: WeightTransform, contents: PackedFiles) -> bool:
    """Whether a model loaded from files would be saved with a conversion: with a prefix only if that is in their names."""
    if not isinstance(conversion, PrefixChange):
        return True
    return any(conversion.rename_source_key(name)[0] != name for name in contents.tensors)


def _model_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    return _by_transformers(
        folder / "config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )


def _by_transformers(file: Path, read: Callable[[], Any]) -> Any:
    """The result of a function of Transformers. What those raise for a damaged file may be anything, without its name."""
    try:
        return read()
    except Exception as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def _check_values(count: FolderCount, contents: PackedFiles) -> None:
    """Check all floating-point values: no NaN, and in packed layers no infinity and no negative scale."""
    packed = {tensor.name for layer in count.layers for tensor in layer.tensors}
    for name, tensor in contents.tensors.items():
        if not isinstance(tensor.dtype, torch.dtype) or not tensor.dtype.is_floating_point:
            continue
        with safe_open(tensor.file, "pt") as file:
            values = file.get_tensor(name).float()
        if values.isnan().any() or (name in packed and values.isinf().any()):
            raise ValueError(f"{tensor.file}: {name} contains infinite or NaN values; the file is damaged")
        if name in packed and name.endswith("_scale") and not name.endswith("_code_scale") and (values < 0).any():
            raise ValueError(f"{tensor.file}: {name} contains negative scales; the file is damaged")


def _check_tokenizer(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer: tokenizer_config.json is missing. Save it there: "
            "AutoTokenizer.from_pretrained(original).save_pretrained(folder)"
        )
    tokenizer = _by_transformers(
        folder / "tokenizer_config.json",
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
    )
    config = _model_config(folder, trust_remote_code).get_text_config()
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer in {folder} has special tokens only: its vocabulary file is missing")
    # Added tokens may be beyond the embeddings: a text model keeps the image token of its family.
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    highest = max((index for token, index in vocabulary.items() if token not in added), default=-1)
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has the token id {highest}, but the model has {config.vocab_size} tokens; "
            "they do not belong together"
        )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
