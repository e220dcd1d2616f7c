"""The processes that share a quantization or a recovery: one per GPU, as `torchrun` or `accelerate launch` start them.

Make one `Processes()` in every process of a program, and pass it on: `quantize_model(..., processes=Processes())`.

What they exchange besides sums passes through gloo and main memory, whatever accelerators they have, and no file system
needs to be shared. Every process must call the methods in the same order.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from .files.contents import byte_view

# How long a process waits for the others: at first, and at work. One that ends is noticed at once; this is for one that
# never comes, or hangs.
_MEETING, _TIMEOUT = timedelta(minutes=10), timedelta(hours=2)

Made = TypeVar("Made")


class ProcessesLost(RuntimeError):
    """Another process has ended, or has not answered in time."""


def launched() -> tuple[int, int]:
    """The number of this process among those that `torchrun` or `accelerate launch` has started, and how many these are."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def refuse_unlaunched() -> None:
    """Reject a process that its environment numbers among several, and that has no way to the others.

    Each of them would take itself for the only one and write the same files.

    Raises:
        RuntimeError: it is one.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count != str(launched()[1]):
        raise RuntimeError(
            f"the environment says WORLD_SIZE={count}, but neither torchrun nor accelerate launch has started this process: "
            "start it with one of them, or for one process alone unset WORLD_SIZE and RANK"
        )


class Processes:
    """What a process needs to know of the others. A program that was started alone is one process.

    Made in all of them: each waits until the others have come.

    Attributes:
        count: number of processes.
        rank: number of this one.
        device: of this one; None if it is alone.

    Raises:
        ProcessesLost: another has ended, or has not come within 10 minutes.
    """

    def __init__(self) -> None:
        self.count, self.rank, self.device = 1, 0, None
        if not torch.distributed.is_available():
            return
        if torch.distributed.is_initialized() or launched()[1] > 1:
            from accelerate import PartialState

            with _coming():
                # Unless it is told so, it takes processes without accelerators for single ones.
                state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_MEETING)
                self.count, self.rank, self.device = state.num_processes, state.process_index, state.device
                if self.count > 1:
                    # It is left in place: the first to leave would disconnect others that have not met everyone yet.
                    torch.distributed.barrier(torch.distributed.new_group(backend="gloo", timeout=_MEETING))
        if self.count > 1:
            with self._answering():
                self._group = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
                self._device_group = self._group
                if self.device.type != "cpu":  # as theirs, but as patient: it may have been made to meet in
                    self._device_group = torch.distributed.new_group(timeout=_TIMEOUT)

    @classmethod
    def alone(cls) -> Processes:
        """One process, however many were started."""
        made = cls.__new__(cls)
        made.count, made.rank, made.device = 1, 0, None
        return made

    @property
    def on_this_machine(self) -> tuple[int, int]:
        """Number of this process among those of this machine, and how many these are; (0, 1) if that is not known."""
        if self.count == 1 or "LOCAL_WORLD_SIZE" not in os.environ:  # which torchrun and accelerate set
            return 0, 1
        return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

    def share(self, items: Sequence) -> Sequence:
        """The items of this process: adjacent ones, as many as others have or one more or less."""
        return self.share_of(self.rank, items)

    def share_of(self, rank: int, items: Sequence) -> Sequence:
        """`share` of another process."""
        return items[rank * len(items) // self.count : (rank + 1) * len(items) // self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in each of them; the tensor is overwritten.

        The same bits in all of them. Another number of processes adds in another order.
        """
        if self.count > 1:
            group = self._group if tensor.device.type == "cpu" else self._device_group
            with self._answering():
                torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def spread(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor with that of process `source`, which has the same dtype and shape, where it is."""
        if self.count > 1:
            group = self._group if tensor.device.type == "cpu" else self._device_group
            with self._answering():
                torch.distributed.broadcast(tensor, source, group=group)

    def in_first(self, make: Callable[[], Made]) -> Made | None:
        """What `make` returns in the first process, and None in the others, which wait for it.

        If it raises an error, all of them do: none is left waiting for the first, and a program may go on in all.
        """
        if self.count == 1:
            return make()
        made, error = None, None
        if self.rank == 0:
            try:
                made = make()
            except Exception as raised:
                error = raised
        _, elsewhere = self.broadcast({}, _that_can_be_sent(error), 0)
        if elsewhere is not None:
            raise error or elsewhere
        return made

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns in the first process, in each of them, on the CPU; errors as by `in_first`."""
        made = self.in_first(make)
        return self.broadcast({} if made is None else {"": made}, None, 0)[0][""]

    def broadcast(self, tensors: Mapping[Any, Tensor], note: Any, source: int) -> tuple[dict[Any, Tensor], Any]:
        """Tensors by any key, and a note that can be pickled, as process `source` passes them, in each of them.

        Returns:
            The tensors, on the CPU where there are several processes, and the note.
        """
        if self.count == 1:
            return dict(tensors), note
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        description = [[(key, tensor.dtype, tensor.shape) for key, tensor in content.items()], note]
        with self._answering():
            torch.distributed.broadcast_object_list(description, source, group=self._group)
            found = {}
            for key, dtype, shape in description[0]:
                tensor = content[key] if self.rank == source else torch.empty(shape, dtype=dtype)
                if tensor.numel():
                    # As bytes: gloo does not know all dtypes.
                    torch.distributed.broadcast(byte_view(tensor), source, group=self._group)
                found[key] = tensor
        return found, description[1]

    def gather(self, tensors: Mapping[Any, Tensor], note: Any) -> list[tuple[dict[Any, Tensor], Any]]:
        """What every process passes to `broadcast`, in the order of their numbers, in each of them."""
        return [self.broadcast(tensors if self.rank == source else {}, note, source) for source in range(self.count)]

    def chain(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The tensors of all processes, in the order of their numbers, in each of them; one is in memory at a time."""
        if self.count == 1:
            yield from parts
            return
        for source in range(self.count):
            own = iter(parts) if source == self.rank else iter(())
            while True:
                part = next(own, None)
                found, _ = self.broadcast({} if part is None else {"": part}, None, source)
                if not found:
                    break
                yield found[""]

    def send(self, tensors: Mapping[Any, Tensor], to: int) -> None:
        """Send tensors by any key to a process, which calls `receive`."""
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        description = [[(key, tensor.dtype, tensor.shape) for key, tensor in content.items()]]
        with self._answering():
            torch.distributed.send_object_list(description, to, group=self._group)
            for tensor in content.values():
                torch.distributed.send(byte_view(tensor), to, group=self._group)

    def receive(self, source: int) -> dict[Any, Tensor]:
        """What a process sends, on the CPU."""
        description: list[Any] = [None]
        found = {}
        with self._answering():
            torch.distributed.recv_object_list(description, source, group=self._group)
            for key, dtype, shape in description[0]:
                found[key] = torch.empty(shape, dtype=dtype)
                torch.distributed.recv(byte_view(found[key]), source, group=self._group)
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            with self._answering():
                torch.distributed.barrier(group=self._group)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say what it means when another process does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessesLost(
                f"another of {self.count} processes has ended, or has not answered for {_TIMEOUT}: its own message says why. "
                "Start all of them again with the same command: with a work folder, it goes on where it was. "
                f"({str(error).splitlines()[0]:.200})"
            ) from error


def _that_can_be_sent(error: Exception | None) -> Exception | None:
    """An error of the same type and message, or one with both in its message if the type cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _coming() -> Iterator[None]:
    """Say what it means when another process does not come to the first meeting."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesLost(
            f"not all processes that were started have come here within {_MEETING}: call this in every one of them, or in none. A "
            "program that one of them starts takes itself for it: start it without the variables of torchrun "
            f"({str(error).splitlines()[0]:.200})"
        ) from error
