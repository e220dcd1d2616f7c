"""Safetensors headers: the tensors of a checkpoint, without loading it. What a file claims is checked before it is used."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .records import read_object

# Names of dtypes in a safetensors header. https://github.com/huggingface/safetensors#format
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE = re.compile(r"[A-Z0-9_]{1,20}")  # of those that PyTorch lacks, too
_NAME_LIMIT = 1000  # characters
METADATA = "__metadata__"
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as described in a header.

    Attributes:
        dtype: the name in the header, for a dtype that PyTorch lacks.
        start: position of its first byte in the file.
    """

    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: by name.
        metadata: texts by key.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        ValueError: the file is not safetensors, is truncated, or its header contradicts itself; the message names the
            file and the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{file} is not a complete safetensors file: {size} bytes with a header of {length}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: the header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is damaged: expected an object, found a {type(header).__name__}")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: the header is damaged: {METADATA} must map names to texts")
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(file, tensors, 8 + length, size)
    return Header(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _stored(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a header; `data` is the position of the first byte after the header."""
    if not name.isprintable() or len(name) > _NAME_LIMIT:  # it will be printed
        raise ValueError(f"{file}: {name!r:.200} is no name of a tensor; the header is damaged")
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    for field, value, expected, valid in (
        ("dtype", dtype, "the name of a dtype", isinstance(dtype, str) and _DTYPE.fullmatch(dtype)),
        ("shape", shape, "a list of sizes", _are_sizes(shape)),
        ("data_offsets", offsets, "two positions", _are_sizes(offsets) and len(offsets) == 2),
    ):
        if not valid:
            raise ValueError(f"{file}: tensor {name!r:.200}: {field} must be {expected}, got {value!r:.100}")
    begin, end = offsets
    known = DTYPES.get(dtype, dtype)
    if isinstance(known, torch.dtype) and end - begin != prod(shape) * known.itemsize:
        raise ValueError(
            f"{file}: tensor {name!r}: data_offsets {offsets} do not fit its dtype {dtype} and shape {shape}"
        )
    return StoredTensor(name, known, tuple(shape), end - begin, file, data + begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _check_places(file: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Tensors must fill the file after the header, without gaps or overlaps."""
    expected = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        end = tensor.start + tensor.nbytes
        if end > size:
            raise ValueError(
                f"{file} is truncated: tensor {tensor.name!r} ends at byte {end}, the file at byte {size}. "
                "Download or copy it again"
            )
        if tensor.start != expected or tensor.nbytes < 0:
            raise ValueError(
                f"{file}: tensor {tensor.name!r} starts at byte {tensor.start}, expected {expected}; the header is damaged"
            )
        expected = end
    if expected != size:
        raise ValueError(f"{file}: {size - expected} bytes at the end belong to no tensor; the file is damaged")


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of a checkpoint, by name.

    Raises:
        ValueError: see `read_header`; or a tensor is in two files.
    """
    return merged(read_header(Path(file)) for file in files)


def merged(headers: Iterable[Header]) -> dict[str, StoredTensor]:
    """The tensors of several files, by name.

    Raises:
        ValueError: a tensor is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name!r} is in {tensors[name].file} and in {tensor.file}; delete one of them"
                )
            tensors[name] = tensor
    return tensors


def rewrite_metadata(file: Path, change: Callable[[dict[str, str]], dict[str, str]] = dict) -> None:
    """Put the metadata of a safetensors file in the order of their names, in place.

    The safetensors library writes them in an order that differs from time to time.

    Args:
        change: makes other metadata from them, which must take as many bytes.

    Raises:
        ValueError: they take more or fewer; the file is unchanged.
    """
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        metadata = dict(sorted(change(header.pop(METADATA, {})).items()))
        text = json.dumps({METADATA: metadata, **header}, separators=(",", ":"), ensure_ascii=False)
        encoded = text.encode().ljust(length)
        if len(encoded) != length:
            raise ValueError(f"{file}: the header changed its length from {length} to {len(encoded)} bytes")
        stream.seek(8)
        stream.write(encoded)
        stream.flush()
        os.fsync(stream.fileno())


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model: its single file, or else those that its index lists, as Transformers loads it.

    Raises:
        FileNotFoundError: `folder` contains no model, or a shard that the index lists is missing.
        ValueError: the index is damaged, or lists a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    files = [single]
    if index.is_file() and not single.is_file():
        files = sorted({folder / name for name in read_index(index).values()})
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; expected a model saved with save_pretrained in {folder}")
    return files


def read_index(index: Path) -> dict[str, str]:
    """The files by the names of their tensors, as an index lists them; empty if there is no index.

    Raises:
        ValueError: the index is damaged, or lists a file outside its folder.
    """
    if not index.is_file():
        return {}
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map names of tensors to files, got {weight_map!r:.100}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map[{name!r}] must be a safetensors file in this folder, got {file!r:.100}"
            )
    return weight_map
