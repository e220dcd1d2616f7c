"""Safetensors headers: the tensors of a checkpoint, without loading it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

# Names of dtypes in a safetensors header. https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as described in a header."""

    name: str
    dtype: torch.dtype | str  # the name in the header, for a dtype that is not in _DTYPES
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        ValueError: the file is not safetensors, or is truncated; the message names the file and the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{file} is not a complete safetensors file: {size} bytes with a header of {length}")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(
                f"{file} is truncated: tensor {name!r} ends at byte {8 + length + end}, the file at byte {size}. "
                "Download or copy it again"
            )
        dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
        tensors[name] = StoredTensor(name, dtype, tuple(entry["shape"]), end - begin, file)
    return tensors


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of a checkpoint, by name. Raises the errors of `read_header`."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(Path(file)))
    return tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model: those that its index lists, or else its single file.

    Raises:
        FileNotFoundError: `folder` contains no model, or a shard that the index lists is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; expected a model saved with save_pretrained in {folder}")
    return files


def check_stored(
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]], files: Iterable[str | Path], base_prefix: str
) -> None:
    """Compare the packed tensors that a model expects with those in its checkpoint, before anything is loaded.

    A missing name is not an error here but in the check after loading, because Transformers may rename keys.

    Args:
        expected: shape and dtype by parameter name.
        files: the safetensors files of the checkpoint.
        base_prefix: name of the base model's attribute, which `AutoModel` strips from names and heads add.

    Raises:
        ValueError: the shape or dtype of a tensor is not the expected one, or its file is truncated.
    """
    stored = read_headers(files)
    for name, (shape, dtype) in expected.items():
        for key in (name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}.")):
            if key not in stored:
                continue
            found = stored[key]
            if found.shape != shape or found.dtype != dtype:
                raise ValueError(
                    f"packed tensor {key!r} in {found.file} is {found.dtype} {list(found.shape)}, but the model's "
                    f"config asks for {dtype} {list(shape)}. The file and config.json do not belong together"
                )
            break
