"""Where a run keeps activations between forward passes: in memory, or in files that are mapped while they are used."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Hashable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..files.contents import byte_view

_CPU = torch.device("cpu")


class Activations(Protocol):
    """Tensors by any key. A tensor may be given on any device."""

    def __getitem__(self, key: Hashable) -> Tensor: ...

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None: ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def join(self, key: Hashable, parts: Iterable[Tensor]) -> None:
        """Keep tensors with equal dtypes and shapes `[*, ...]` as one, concatenated."""


class HeldActivations(dict):
    """In memory.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device = _CPU):
        super().__init__()
        self._device = device

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        super().__setitem__(key, tensor.to(self._device))

    def join(self, key: Hashable, parts: Iterable[Tensor]) -> None:
        self[key] = torch.cat([part.to(self._device) for part in parts])


class _Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class MappedActivations(MutableMapping):
    """On the CPU in files, one for each tensor, which are deleted with this object.

    A tensor that is read is a private mapping of its file, so it takes memory only while it is used, and the system may
    take that back at any time. Replacing a tensor does not change one that was read before.

    Args:
        parent: folder to make a folder of its own in.

    Raises (when a tensor is kept):
        OSError: it cannot be written; the message names the file and its size.
    """

    def __init__(self, parent: Path):
        self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=parent))
        self._stored: dict[Hashable, _Stored] = {}
        self._written = 0
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __getitem__(self, key: Hashable) -> Tensor:
        file, dtype, shape = self._stored[key]
        size = torch.Size(shape).numel()
        if not size:  # an empty file cannot be mapped
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(file), shared=False, size=size, dtype=dtype).view(shape)

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self.join(key, [tensor])

    def __delitem__(self, key: Hashable) -> None:
        self._stored.pop(key).file.unlink()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._stored  # that of the base would map the file

    def join(self, key: Hashable, parts: Iterable[Tensor]) -> None:
        # Always a new file: the one that it replaces may be mapped, and would end under whoever reads it.
        file, rows, first = self._folder / str(self._written), 0, None
        self._written += 1
        with file.open("wb") as stream:
            for part in parts:
                first, rows = part if first is None else first, rows + len(part)
                _write(stream, part, file)
        if key in self._stored:
            del self[key]
        self._stored[key] = _Stored(file, first.dtype, (rows, *first.shape[1:]))


def _write(stream, tensor: Tensor, file: Path) -> None:
    content = byte_view(tensor).numpy()
    try:
        stream.write(content)
        stream.flush()  # here, where the error is named, and not when the file is closed
    except OSError as error:
        raise OSError(f"{file} ({content.nbytes} bytes of activations) could not be written: {error}") from error
