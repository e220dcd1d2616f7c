"""The size of a saved model, counted on its files: the tensors of each packed layer, and everything else.

The "2 bits" in a format's name are those of the codes. A download also contains scales, embeddings, an output head
and norms, so every number here comes from the headers of the safetensors files, and the parts add up to their size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..codecs.base import Codec
from ..config import CONFIGS, PackedConfig
from ..modules import STACKS, parameter_name
from .headers import StoredTensor, checkpoint_files, read_headers
from .packing import PackedFiles
from .records import read_object


@dataclass(frozen=True)
class LayerCount:
    """One packed layer as stored in its file.

    Attributes:
        name: name of the module; for fused experts, followed by the name of the stack.
        out_features, in_features: size of the dense weight that the codes represent.
        tensors: its packed tensors: the codes, then their companions. A bias is not included.
        codec: its format.
        experts: number of weights of that size: 1, or the number in the stack.
    """

    name: str
    out_features: int
    in_features: int
    tensors: tuple[StoredTensor, ...]
    codec: Codec
    experts: int = 1

    @property
    def weights(self) -> int:
        """Number of weights that the codes represent."""
        return self.experts * self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, companions included."""
        return 8 * self.nbytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serializable values."""
        return {
            "name": self.name,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "experts": self.experts,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.nbytes,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "bytes": tensor.nbytes,
                }
                for tensor in self.tensors
            ],
        }


@dataclass(frozen=True)
class FolderCount:
    """The sizes of a saved model. `packed_bytes` and the four other parts `*_bytes` add up to `file_bytes`.

    Attributes:
        folder: the saved model.
        config: its quantization config; None if it is not packed.
        layers: its packed layers, in the natural order of their names.
        embedding_bytes: token embeddings (including a tied output head).
        head_bytes: the output head, if it is stored separately and not packed.
        other_bytes: all other tensors: norms, biases, dense layers.
        header_bytes: the headers of the safetensors files.
        file_bytes: size of the safetensors files.
        dense_parameters: number of values in the tensors that are not packed.
    """

    folder: Path
    config: PackedConfig | None
    layers: tuple[LayerCount, ...]
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    header_bytes: int
    file_bytes: int
    dense_parameters: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed layers, companions included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def packed_weights(self) -> int:
        """Number of weights that the packed layers represent."""
        return sum(layer.weights for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model as if it were dense."""
        return self.packed_weights + self.dense_parameters

    @property
    def bits_per_packed_weight(self) -> float | None:
        """Bits per weight over the packed layers, companions included; None if there are no packed layers."""
        return 8 * self.packed_bytes / self.packed_weights if self.layers else None

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of the whole model: everything in the files, headers included."""
        return 8 * self.file_bytes / self.parameters

    @property
    def left_unpacked(self) -> dict[str, str]:
        """Why each parameter of two or more dimensions was not packed; layer numbers in names are replaced by `*`."""
        return self.config.left_unpacked if self.config else {}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serializable values."""
        return {
            "folder": str(self.folder),
            "quantization_config": self.config.to_dict() if self.config else None,
            "bits_per_packed_weight": self.bits_per_packed_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "parameters": self.parameters,
            "packed_weights": self.packed_weights,
            "file_bytes": self.file_bytes,
            "bytes": {
                "packed": self.packed_bytes,
                "embeddings": self.embedding_bytes,
                "head": self.head_bytes,
                "other": self.other_bytes,
                "header": self.header_bytes,
            },
            "left_unpacked": self.left_unpacked,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def count_folder(folder: Path) -> FolderCount:
    """Count a model saved with `save_pretrained`, packed or not, without loading it.

    Raises:
        FileNotFoundError: config.json or a safetensors file is missing.
        ValueError: the model is quantized with another method, was written by a newer version, or is damaged: a file
            is truncated, or a tensor of a packed layer is missing or has the wrong shape. The message names it.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing; expected a model saved with save_pretrained in {folder}")
    settings = read_object(config_file)
    files = checkpoint_files(folder)
    config = packed_config(settings, config_file)
    packed_files = PackedFiles.read(files, config) if config else None
    stored = packed_files.tensors if packed_files else read_headers(files)
    layers = _packed_layers(packed_files) if packed_files else ()
    packed = {tensor.name for layer in layers for tensor in layer.tensors}
    dense = [tensor for name, tensor in stored.items() if name not in packed]
    embeddings, heads = _vocabulary_tensors(dense, layers, settings)
    file_bytes = sum(file.stat().st_size for file in files)
    dense_bytes = sum(tensor.nbytes for tensor in dense)
    embedding_bytes = sum(tensor.nbytes for tensor in embeddings)
    head_bytes = sum(tensor.nbytes for tensor in heads)
    return FolderCount(
        folder=folder,
        config=config,
        layers=layers,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=dense_bytes - embedding_bytes - head_bytes,
        header_bytes=file_bytes - dense_bytes - sum(layer.nbytes for layer in layers),
        file_bytes=file_bytes,
        dense_parameters=sum(tensor.numel for tensor in dense),
    )


def packed_config(settings: dict[str, Any], file: Path) -> PackedConfig | None:
    """The quantization config in the content of a config.json; None if it has none.

    Raises:
        ValueError: it is damaged, or of another method; the message names the file.
    """
    fields = settings.get("quantization_config")
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: quantization_config must be an object, got {fields!r:.100}")
    method = fields.get("quant_method")
    if method not in tuple(CONFIGS):
        raise ValueError(f"{file.parent} is quantized with {method!r:.100}; expected {' or '.join(CONFIGS)}")
    try:
        return CONFIGS[method].from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _packed_layers(files: PackedFiles) -> tuple[LayerCount, ...]:
    """The packed weights of the packed modules."""
    found: dict[str, str] = {}
    for module, codec in files.codecs.items():
        for parameter in ("weight", *STACKS):
            for suffix, (_, dtype) in codec.specs(codec.row_multiple, codec.multiple).items():
                tensor = files.tensors.get(f"{module}.{parameter_name(suffix, parameter)}")
                # A dense weight has the packed one's name, but never its integer dtype.
                if tensor is not None and (suffix or tensor.dtype == dtype):
                    found[f"{module}.{parameter}"] = module
    names = sorted(found, key=_natural)
    return tuple(_packed_layer(name, files.tensors, files.codecs[found[name]]) for name in names)


def _packed_layer(name: str, stored: dict[str, StoredTensor], codec: Codec) -> LayerCount:
    """One weight or stack, checked against the codec. The number of inputs is derived from the packed words."""
    module, _, parameter = name.rpartition(".")
    label = module if parameter == "weight" else name
    unit = codec.specs(codec.row_multiple, codec.multiple)
    names = {suffix: f"{module}.{parameter_name(suffix, parameter)}" for suffix in unit}
    tensors = {suffix: stored.get(key) for suffix, key in names.items()}
    missing = [names[suffix] for suffix, tensor in tensors.items() if tensor is None]
    if missing:
        files = sorted({str(tensor.file) for tensor in tensors.values() if tensor is not None})
        raise ValueError(
            f"{', '.join(files)}: packed layer {label!r} lacks {', '.join(missing)}; the checkpoint is incomplete"
        )
    words, scale = tensors[""], tensors["scale"]
    per_unit, dimensions = unit[""][0][1], 2 if parameter == "weight" else 3
    if len(words.shape) != dimensions or words.shape[-1] % per_unit:
        raise ValueError(
            f"{words.file}: {words.name} is {words.dtype} {list(words.shape)}; expected packed words of {dimensions} dimensions, the "
            f"last one a multiple of {per_unit}"
        )
    if len(scale.shape) != dimensions - 1:
        raise ValueError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}; expected one scale per output channel"
        )
    *stack, out_features = scale.shape
    in_features = words.shape[-1] // per_unit * codec.multiple
    for suffix, (shape, dtype) in codec.specs(out_features, in_features).items():
        found = tensors[suffix]
        if found.shape != (*stack, *shape) or found.dtype != dtype:
            raise ValueError(
                f"{found.file}: {found.name} is {found.dtype} {list(found.shape)}, but a layer of {out_features} outputs and "
                f"{in_features} inputs has {dtype} {[*stack, *shape]} there; file and config.json do not belong together"
            )
    return LayerCount(label, out_features, in_features, tuple(tensors.values()), codec, stack[0] if stack else 1)


def _vocabulary_tensors(
    dense: list[StoredTensor], layers: tuple[LayerCount, ...], settings: dict[str, Any]
) -> tuple[list[StoredTensor], list[StoredTensor]]:
    """Those of embeddings and output head that are not packed, recognized by shape and position, so that no list of
    architectures is needed.

    Both are matrices with one row per token. The head is a module of the outer model, the embeddings are deeper, in
    its base model. If there is only one such matrix, it is the embedding, and the head is tied to it.
    """
    text = settings.get("text_config")
    vocabulary = (text if isinstance(text, dict) else settings).get("vocab_size")
    matrices = [tensor for tensor in dense if len(tensor.shape) == 2 and tensor.shape[0] == vocabulary]
    # One of the two may be packed; what has as many outputs in a decoder block, which has a number, is neither.
    wide = [layer.tensors[0] for layer in layers if layer.out_features == vocabulary]
    packed = [tensor for tensor in wide if not any(part.isdigit() for part in tensor.name.split("."))]
    depths = {tensor.name.count(".") for tensor in matrices + packed}
    outer = min(depths) if len(depths) > 1 else -1
    heads = [tensor for tensor in matrices if tensor.name.count(".") == outer]
    return [tensor for tensor in matrices if tensor not in heads], heads


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def layer_groups(count: FolderCount) -> dict[tuple[str, int, int, Codec], list[LayerCount]]:
    """The packed layers, grouped by name (with `*` for the layer numbers), outputs, inputs and format."""
    groups: dict[tuple[str, int, int, Codec], list[LayerCount]] = {}
    for layer in count.layers:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        groups.setdefault((name, layer.out_features, layer.in_features, layer.codec), []).append(layer)
    return groups


def readable_size(nbytes: int) -> str:
    """`1536` -> `1.5 KiB`."""
    size, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{nbytes} bytes" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
