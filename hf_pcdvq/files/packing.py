"""What the safetensors files of a packed model say of themselves, in their metadata under one key:

- the codec of every packed module, so that no class that opens the file and no pattern can decide otherwise;
- the settings that config.json must hold, and a hash of each of its other fields;
- a hash of every tensor in the file, and one of the whole model, which all of its files share.

`save_file` writes such files; `PackedFiles` reads and checks them. docs/formats.md describes the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.description import codec_described, description
from ..modules import STACKS, PackedModule, parameter_name
from ..modules.divided import whole
from ..modules.tied import is_tied
from ..version import FORMAT_VERSION, INSTALL
from .contents import content_hash, model_hash, tensor_hash
from .headers import Header, StoredTensor, merged, read_header, rewrite_metadata
from .hollow import HollowFiles, lay_out
from .names import matched_names, name_in_files

if TYPE_CHECKING:
    from ..config import PackedConfig

KEY = "hf_pcdvq"
# In the metadata that a quantizer gives to `save_pretrained`, never in a file: lay the files out, tensors follow.
HOLLOW = "hf_pcdvq.hollow"
_NO_HASH = "0" * 32  # stands for a hash in files that are only laid out
# Fields of config.json that say how, by whom or in which precision a model is run, not what it computes; and our own,
# which are compared by themselves.
_NOT_HASHED = {
    "_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype",
    "transformers_version", "transformers_weights",
}  # fmt: skip
_THREADS = 4


@dataclass(frozen=True)
class PackingRecord:
    """The record in the metadata of one file.

    Attributes:
        settings: the fields of `quantization_config` that decoding depends on.
        config: hashes of the other fields of config.json.
        codecs: description of codecs, each with the names of its modules.
        model: a hash of all tensors of the model.
        hashes: hashes of the tensors in this file.
        format_version: version of the packed format.
    """

    settings: dict[str, Any]
    config: dict[str, str]
    codecs: list[list[Any]]
    model: str
    hashes: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, model: nn.Module, config: PackedConfig) -> PackingRecord:
        """The record of a model that is about to be saved, without hashes of its tensors."""
        modules: dict[Codec, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedModule) and not is_tied(model, name):
                modules.setdefault(module.codec, []).append(name_in_files(model, name))
        fields = json.loads(model.config.to_json_string(use_diff=True))
        codecs = [[description(codec), names] for codec, names in modules.items()]
        return cls(config.decoding_fields(), config_hashes(fields), codecs, model_hash(_tensor_hashes(model)))

    def metadata(self) -> dict[str, str]:
        """The metadata of a file that holds it."""
        return {KEY: json.dumps(asdict(self), separators=(",", ":"))}

    def hollow(self) -> dict[str, str]:
        """The metadata with which `save_file` lays out files, to be completed by `complete`."""
        return {**replace(self, model=_NO_HASH).metadata(), HOLLOW: ""}

    @classmethod
    def read(cls, file: Path, header: Header) -> PackingRecord | None:
        """The record in a file; None if it has none.

        Raises:
            ValueError: it is damaged, or was written by a newer version; the message names the file and the field.
        """
        if KEY not in header.metadata:
            return None
        where = f"{file}: metadata {KEY!r}"
        try:
            content = json.loads(header.metadata[KEY])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is damaged: {error}") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version must be an integer up to {FORMAT_VERSION}, got {version!r:.100}; if the file was "
                f"written by a newer version: {INSTALL}, once that is updated"
            )
        for name, valid in _VALID.items():
            if name not in content or not valid(content[name]):
                raise ValueError(f"{where}: {name} is missing or damaged")
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _assignments(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], list) and all(map(_is_name, pair[1]))
        for pair in value
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


_VALID = {
    "settings": lambda value: isinstance(value, dict),
    "config": _texts,
    "codecs": _assignments,
    "model": _is_name,
    "hashes": _texts,
}


# ------------------------------------------------------------------------------------------------------------- hashes


def _tensor_hashes(model: nn.Module) -> dict[str, str]:
    """Hashes of all tensors of a model; empty texts for those that are offloaded to disk."""
    return {
        name: tensor_hash(whole(tensor)) if isinstance(tensor, Tensor) and tensor.device.type != "meta" else ""
        for name, tensor in model.state_dict().items()
    }


def config_hashes(fields: dict[str, Any]) -> dict[str, str]:
    """Short hashes of the fields of a config.json that the results of a model depend on."""
    return {
        name: xxhash.xxh3_64_hexdigest(json.dumps(_without_dtypes(value), sort_keys=True).encode())
        for name, value in fields.items()
        if name not in _NOT_HASHED
    }


def _without_dtypes(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_dtypes(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_dtypes(entry) for name, entry in value.items() if name not in _NOT_HASHED}
    return value


# -------------------------------------------------------------------------------------------------------------- saving


def save_file(tensors: dict[str, Tensor], filename: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`; a record in the metadata gets the hashes of the tensors.

    The same tensors and metadata always give the same bytes.
    """
    if not metadata or KEY not in metadata:
        safetensors.torch.save_file(tensors, filename, metadata)
        return
    if HOLLOW in metadata:
        metadata = {name: text for name, text in metadata.items() if name != HOLLOW}
        lay_out(tensors, Path(filename), _with_hashes(metadata, dict.fromkeys(tensors, _NO_HASH)))
        return
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, filename, _with_hashes(metadata, hashes))
    rewrite_metadata(Path(filename))


def complete(files: HollowFiles, hashes: dict[str, str], model: str) -> None:
    """Record the hashes of tensors in files that were laid out and have been filled.

    Args:
        hashes: of all tensors in the files, by name.
        model: the hash of the model.

    Raises:
        ValueError: a tensor has not been written.
    """

    def final(metadata: dict[str, str], names: Iterable[str]) -> dict[str, str]:
        return _with_hashes(metadata, {name: hashes[name] for name in names}, model)

    files.finish(final)


def _with_hashes(metadata: dict[str, str], hashes: dict[str, str], model: str | None = None) -> dict[str, str]:
    record = json.loads(metadata[KEY])
    record["hashes"] = dict(sorted(hashes.items()))
    record["model"] = record["model"] if model is None else model
    return {**metadata, KEY: json.dumps(record, separators=(",", ":"))}


def save_with(module: ModuleType) -> None:
    """Let a module of Transformers write with `save_file`. Idempotent; files without a record are written as before.

    `save_pretrained` has no hook between cutting a model into files and writing them, and only there is it known
    which tensors a file holds, under which names.
    """
    module.__dict__["safe_save_file"] = save_file


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PackedFiles:
    """The files of a packed model.

    Attributes:
        tensors: their tensors, by name.
        codecs: the codecs of the packed modules, by the modules' names in the files.
        record: what the files have in common; None if they were saved without a record.
        hashes: hashes of the tensors, by name; empty without a record.
    """

    tensors: dict[str, StoredTensor]
    codecs: dict[str, Codec]
    record: PackingRecord | None
    hashes: dict[str, str]

    @classmethod
    def read(cls, files: Iterable[str | Path], config: PackedConfig) -> PackedFiles:
        """Read the headers of all files of a model.

        Raises:
            ValueError: a file is damaged, or the files do not belong together, or not to the config.
        """
        headers = {Path(file): read_header(Path(file)) for file in files}
        records = {file: PackingRecord.read(file, header) for file, header in headers.items()}
        tensors = merged(headers.values())
        record = _common(records)
        if record is None:
            return cls(tensors, _codecs_without_record(tensors, config), None, {})
        _check_settings(record, config, next(iter(headers)))
        hashes: dict[str, str] = {}
        for file, header in headers.items():
            own = records[file].hashes
            if own.keys() != header.tensors.keys():
                name = sorted(own.keys() ^ header.tensors.keys())[0]
                raise ValueError(
                    f"{file}: tensor {name!r:.200} is in the header or in metadata {KEY!r}, but not in both"
                )
            hashes.update(own)
        return cls(tensors, _recorded_codecs(record, tensors, next(iter(headers))), record, hashes)

    def check_shapes(self, module: str, expected: dict[str, Tensor]) -> None:
        """Compare the packed tensors of a module with those that a model expects, before anything is loaded.

        Args:
            module: its name in the files.
            expected: its parameters, on the meta device, by their names in the module.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype.
        """
        missing = [f"{module}.{key}" for key in expected if f"{module}.{key}" not in self.tensors]
        if missing:
            raise ValueError(
                f"tensors of a packed layer are not in the checkpoint: {', '.join(missing)}. The model would compute with "
                "random weights"
            )
        for key, tensor in expected.items():
            found = self.tensors[f"{module}.{key}"]
            if found.shape != tuple(tensor.shape) or found.dtype != tensor.dtype:
                raise ValueError(
                    f"packed tensor {found.name!r} in {found.file} is {found.dtype} {list(found.shape)}, but the model's "
                    f"config asks for {tensor.dtype} {list(tensor.shape)}. The file and config.json do not belong together"
                )

    def check_hashes(self) -> None:
        """Compare every tensor with its hash. Reads all files.

        Raises:
            ValueError: a tensor was changed; the message names it and its file.
        """
        names: dict[Path, list[str]] = {}
        for name in self.hashes:
            names.setdefault(self.tensors[name].file, []).append(name)
        with ThreadPoolExecutor(_THREADS) as pool:
            for file, inside in names.items():
                with file.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
                    with memoryview(content) as view:
                        found = pool.map(lambda name, view=view: _stored_hash(self.tensors[name], view), inside)
                        wrong = [name for name, digest in zip(inside, list(found)) if digest != self.hashes[name]]
                if wrong:
                    raise ValueError(
                        f"{file}: the content of {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''} is not what was "
                        "saved: its hash differs. The file is damaged or was changed; download or copy it again"
                    )


def _stored_hash(tensor: StoredTensor, file: memoryview) -> str:
    with file[tensor.start : tensor.start + tensor.nbytes] as content:
        return content_hash(tensor.dtype, tensor.shape, content)


def _common(records: dict[Path, PackingRecord | None]) -> PackingRecord | None:
    """What the records of all files have in common."""
    first, *others = records
    for file in others:
        a, b = records[first], records[file]
        if (a and replace(a, hashes={})) != (b and replace(b, hashes={})):
            raise ValueError(f"{first} and {file} were not saved together: they belong to different models")
    return records[first]


def _check_settings(record: PackingRecord, config: PackedConfig, file: Path) -> None:
    expected = json.loads(json.dumps(config.decoding_fields()))
    for name in sorted(expected.keys() | record.settings.keys()):
        stored, found = record.settings.get(name), expected.get(name)
        if stored != found:
            raise ValueError(
                f"{file} was saved with {name} {stored!r:.100}, but config.json says {found!r:.100}. They do not belong "
                "together: take both from the same model"
            )


def _recorded_codecs(record: PackingRecord, tensors: dict[str, StoredTensor], file: Path) -> dict[str, Codec]:
    codecs: dict[str, Codec] = {}
    for described, modules in record.codecs:
        try:
            codec = codec_described(described)
        except ValueError as error:
            raise ValueError(f"{file}: metadata {KEY!r}: {error}") from error
        codecs.update(dict.fromkeys(modules, codec))
    # Of files that another program wrote, with the beginnings of names changed.
    stored = {name.rpartition(".")[0] for name in tensors}
    names = {module: name for name, module in matched_names(codecs, stored).items()}
    missing = [module for module in codecs if module not in names]
    if missing:
        raise ValueError(
            f"{file}: metadata {KEY!r} says that {missing[0]!r:.200} is packed, but no file holds it; the checkpoint is incomplete"
        )
    return {names[module]: codec for module, codec in codecs.items()}


def _codecs_without_record(tensors: dict[str, StoredTensor], config: PackedConfig) -> dict[str, Codec]:
    """Every module with scales or packed words has the codec of the config, if there is only one.

    Raises:
        ValueError: the config has overrides: which module has which setting is not known.
    """
    dense = ("weight", *STACKS)
    scales = {parameter_name("scale", parameter) for parameter in dense}
    modules = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        words = isinstance(tensor.dtype, torch.dtype) and not tensor.dtype.is_floating_point
        if parameter in scales or (parameter in dense and words):
            modules[module] = config.codec
    if modules and (config.overrides or config.embeddings or config.head):
        raise ValueError(
            f"{next(iter(tensors.values())).file} was saved by another program than hf_pcdvq and does not say which of its "
            "settings a layer has. Take the original files, or load them where they can be loaded and save with save_pretrained"
        )
    return modules
