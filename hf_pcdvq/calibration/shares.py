"""`Shares`: the windows of a calibration in a fixed number of shares, which processes divide among themselves.

Sums over all windows are made share by share, added one after the other in fours, and these in fours again. Which process
computes a share changes neither what is added nor in which order, so that the sums have the same bits for any number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes import Processes
from .data import window_batches
from .hessian import InputMoments

# So many shares at most, of so many windows at least.
_MOST, _LEAST = 16, 8
# So many are added one after the other. One process then holds three sums at most: of all shares so far, of those of the
# present four, and of the present one. Pairs would take five; all in one row, which other processes cannot add up in
# advance, as many as a process has shares.
_ADDED = 4

Sums = dict[str, InputMoments]


@dataclass(frozen=True)
class Shares:
    """The shares of this process.

    Attributes:
        number: of all shares.
        batches: token ids int64 `[b, L]`; the windows of a batch go through a block at once.
        spans: for every share of this process, by its number, the numbers of its batches.
        processes: those that divide the shares.
    """

    number: int
    batches: list[Tensor]
    spans: dict[int, range]
    processes: Processes

    @classmethod
    def of(
        cls, windows: Tensor, device: torch.device, tokens: int | None = None, processes: Processes | None = None
    ) -> Shares:
        """Divide windows, int64 `[n, L]`; see `window_batches` for `device` and `tokens`.

        Raises:
            ValueError: see `share_count`.
        """
        processes = processes or Processes.alone()
        number = share_count(len(windows), processes.count)
        batches: list[Tensor] = []
        spans: dict[int, range] = {}
        for share in processes.share(range(number)):
            first = len(batches)
            own = windows[share * len(windows) // number : (share + 1) * len(windows) // number]
            batches += window_batches(own, device, tokens)
            spans[share] = range(first, len(batches))
        return cls(number, batches, spans, processes)

    @property
    def at_once(self) -> int:
        """How many windows the largest batch of all processes has."""
        return max(largest for _, largest in self.processes.gather({}, max(map(len, self.batches))))

    def total(self, of: Callable[[int], Sums], nothing: Callable[[], Sums]) -> Sums:
        """Sums over the shares of all processes, in each of them.

        Args:
            of: computes those over one share of this process.
            nothing: makes those over none.
        """
        own = self.processes.share(range(self.number))
        held = {
            node: _added(*node, lambda low, high: of(low) if high - low == 1 else None)
            for node in _nodes(own, 0, self.number)
        }

        def found(low: int, high: int) -> Sums | None:
            owner = self._owner(low)
            if self._owner(high - 1) != owner:
                return None
            sums = held.pop((low, high)) if owner == self.processes.rank else nothing()
            if self.processes.count > 1:
                extents = {name: moments.extent for name, moments in sums.items()}
                _, extents = self.processes.broadcast({}, extents, owner)
                for name, moments in sums.items():
                    moments.receive(extents[name], lambda tensor: self.processes.spread(tensor, owner))
            return sums

        return _added(0, self.number, found)

    def _owner(self, share: int) -> int:
        return next(
            rank for rank in range(self.processes.count) if share in self.processes.share_of(rank, range(self.number))
        )


def share_count(windows: int, processes: int) -> int:
    """In how many shares so many windows are divided.

    Raises:
        ValueError: there are fewer shares than processes.
    """
    number = max(1, min(_MOST, windows // _LEAST))
    if number < processes:
        raise ValueError(
            f"{windows} windows make {number} shares, of at least {_LEAST} each and {_MOST} at most, too few for "
            f"{processes} processes: start at most {number}"
            + (", or calibrate on more windows" if number < _MOST else "")
        )
    return number


def sums_at_once(processes: int) -> int:
    """How many sums one of so many processes holds at most."""
    shares = range(_MOST)
    owned = [shares[rank * _MOST // processes : (rank + 1) * _MOST // processes] for rank in range(processes)]
    # Those that wait for others; and of all, of four, while they are added up.
    return max(len(_nodes(own, 0, _MOST)) for own in owned) + 2


def _parts(low: int, high: int) -> list[tuple[int, int]]:
    """The ranges whose sums are added one after the other for that of a range."""
    count = min(_ADDED, high - low)
    cuts = [low + number * (high - low) // count for number in range(count + 1)]
    return list(zip(cuts, cuts[1:]))


def _nodes(own: Sequence[int], low: int, high: int) -> list[tuple[int, int]]:
    """The largest ranges in the order of addition that consist of a process's own shares."""
    if low in own and high - 1 in own:
        return [(low, high)]
    if high - low == 1:
        return []
    return [node for part in _parts(low, high) for node in _nodes(own, *part)]


def _added(low: int, high: int, found: Callable[[int, int], Sums | None]) -> Sums:
    """The sums over shares `low` to `high`: what `found` knows of a range, and what has to be added."""
    sums = found(low, high)
    if sums is None:
        first, *others = _parts(low, high)
        sums = _added(*first, found)
        for part in others:
            for name, moments in _added(*part, found).items():
                sums[name].add_sums(moments)
    return sums
