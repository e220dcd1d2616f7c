"""The size that a safetensors file will have, to the byte, before anything is quantized."""

from __future__ import annotations

import json
import math

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from ..codecs import Codec
from ..codecs.description import description
from ..config import PackedConfig
from ..files.headers import DTYPES
from ..files.packing import PackingRecord, config_hashes
from ..modules import dense_weights, parameter_name

Shape = tuple[tuple[int, ...], torch.dtype]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Of dtypes, in files of the safetensors library: the last ones come first.
_ORDER = [
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32",
    "C64", "F64", "I64", "U64",
]  # fmt: skip
_HASH = "0" * 32  # as long as a hash
_ALIGNMENT = 8


def file_bytes(model: nn.Module, names: list[str], config: PackedConfig) -> int:
    """Bytes of the file of a dense model once its modules `names` are packed according to `config`.

    A model that is saved in several files has a header in each, with the same record.
    """
    tensors = _tensors(model, names, config)
    codecs: dict[Codec, list[str]] = {}
    chosen = set(names)
    for name, _ in model.named_modules():
        if name in chosen:
            codecs.setdefault(config.codec_of(name), []).append(name)
    fields = config_hashes(json.loads(model.config.to_json_string(use_diff=True)))
    described = [[description(codec), modules] for codec, modules in codecs.items()]
    hashes = dict.fromkeys(sorted(tensors), _HASH)
    record = PackingRecord(config.decoding_fields(), fields, described, _HASH, hashes)
    return _header_bytes(tensors, {"format": "pt", **record.metadata()}) + sum(map(_nbytes, tensors.values()))


def _tensors(model: nn.Module, names: list[str], config: PackedConfig) -> dict[str, Shape]:
    """Shape and dtype of every tensor in the file, by its name there."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    dense = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items() if name not in tied
    }
    packed: dict[str, Shape] = {}
    for name in names:
        for parameter, weight in dense_weights(model.get_submodule(name)).items():
            *stack, rows, columns = weight.shape
            del dense[f"{name}.{parameter}"]
            for suffix, (shape, dtype) in config.codec_of(name).specs(rows, columns).items():
                packed[f"{name}.{parameter_name(suffix, parameter)}"] = ((*stack, *shape), dtype)
    return _renamed(model, dense, everything=True) | _renamed(model, packed, everything=False)


def _renamed(model: nn.Module, tensors: dict[str, Shape], everything: bool) -> dict[str, Shape]:
    """With the names that saving gives to them: packed weights keep theirs, up to a prefix of the whole model."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        stock = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in stock if not isinstance(entry, PrefixChange)]
    kind = WeightRenaming if everything else PrefixChange
    for entry in reversed(conversions):
        if isinstance(entry, kind):
            back = entry.reverse_transform()
            tensors = {back.rename_source_key(name)[0]: tensor for name, tensor in tensors.items()}
    return tensors


def _nbytes(tensor: Shape) -> int:
    shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _header_bytes(tensors: dict[str, Shape], metadata: dict[str, str]) -> int:
    """Length of a safetensors header, its own length in front included."""
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    # In the order in which the library writes them, because what is in front determines the digits of places.
    for name, (shape, dtype) in sorted(
        tensors.items(), key=lambda item: (-_ORDER.index(_NAMES[item[1][1]]), item[0])
    ):
        stop = start + _nbytes((shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT
