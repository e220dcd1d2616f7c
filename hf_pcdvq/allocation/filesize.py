"""The size that a safetensors file will have, to the byte, before anything is quantized."""

from __future__ import annotations

import json
import math

import torch
from torch import nn

from ..codecs import Codec
from ..codecs.description import description
from ..config import PackedConfig
from ..files.headers import DTYPES
from ..files.packing import KEY, PackingRecord, config_hashes
from ..modules import dense_weights, parameter_name

Shape = tuple[tuple[int, ...], torch.dtype]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
    """Shape and dtype of every tensor in the file, by name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items() if name not in tied
    }
    for name in names:
        for parameter, weight in dense_weights(model.get_submodule(name)).items():
            *stack, rows, columns = weight.shape
            del tensors[f"{name}.{parameter}"]
            for suffix, (shape, dtype) in config.codec_of(name).specs(rows, columns).items():
                tensors[f"{name}.{parameter_name(suffix, parameter)}"] = ((*stack, *shape), dtype)
    return tensors


def _nbytes(tensor: Shape) -> int:
    shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _header_bytes(tensors: dict[str, Shape], metadata: dict[str, str]) -> int:
    """Length of a safetensors header, its own length in front included."""
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    # By decreasing alignment, then by name, as the library writes them: what is in front determines the digits of places.
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        stop = start + _nbytes((shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT
