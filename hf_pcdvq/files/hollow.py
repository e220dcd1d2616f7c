"""Safetensors files that are laid out before their tensors are known, and filled one tensor at a time.

They take the same bytes as those that the safetensors library writes of the same tensors at once: the order of the
tensors is asked from it, and everything that is known only in the end, hashes, has a fixed length.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .contents import byte_view
from .headers import METADATA, Header, StoredTensor, merged, read_header, rewrite_metadata

_ALIGNMENT = 8  # of the tensors in a file, in bytes


def lay_out(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file with the header of these tensors, which may be on the meta device, and room for them.

    Raises:
        OSError: it cannot be made that large; the message names it.
    """
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    blob = safetensors.torch.save(empty, metadata)
    entries = json.loads(blob[8 : 8 + struct.unpack("<Q", blob[:8])[0]])
    entries.pop(METADATA)
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": entry["dtype"], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    size = 8 + len(text) + end
    try:
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            if hasattr(os, "posix_fallocate"):  # a full disk is found now
                stream.flush()
                os.posix_fallocate(stream.fileno(), 0, size)
            stream.truncate(size)
    except OSError as error:
        raise OSError(f"{file} of {size} bytes could not be made: {error}") from error


class HollowFiles:
    """The files of a model that have been laid out, to be filled.

    Args:
        files: of one model.
    """

    def __init__(self, files: Iterable[Path]):
        self._headers: dict[Path, Header] = {file: read_header(file) for file in files}
        self._tensors: dict[str, StoredTensor] = merged(self._headers.values())
        self._missing = set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: it has another dtype or shape than its place, or has been written before.
            OSError: it cannot be written.
        """
        place = self._tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape) or name not in self._missing:
            raise ValueError(
                f"{place.file}: {name!r} has a place for {place.dtype} {list(place.shape)}, "
                f"{'filled already' if name not in self._missing else 'got'} {tensor.dtype} {list(tensor.shape)}"
            )
        try:
            with place.file.open("r+b") as stream:
                stream.seek(place.start)
                stream.write(byte_view(tensor).numpy())
        except OSError as error:
            raise OSError(f"tensor {name!r} could not be written to {place.file}: {error}") from error
        self._missing.discard(name)

    def finish(self, final: Callable[[dict[str, str], Iterable[str]], dict[str, str]]) -> None:
        """Complete the metadata of every file.

        Args:
            final: makes them from those that were laid out and the names of the tensors, with the same length.

        Raises:
            ValueError: a tensor has not been written; or the metadata have another length.
        """
        if self._missing:
            raise ValueError(f"tensors were never written: {', '.join(sorted(self._missing)[:4])}")
        for file, header in self._headers.items():
            names = list(header.tensors)
            rewrite_metadata(file, lambda metadata, names=names: final(metadata, names))  # type: ignore[misc]
