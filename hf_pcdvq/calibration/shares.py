"""`Shares`: the windows of a calibration in a fixed number of shares, which processes divide among themselves.

Sums over all windows are made share by share and then added in pairs, pairs of pairs, and so on. Which process computes
a share changes neither what is added nor in which order, so that the sums have the same bits for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes import Processes
from .data import window_batches
from .hessian import InputMoments

# So many shares at most, of so many windows at least. Adding them in pairs holds a sum for each power of two.
_MOST, _LEAST = 16, 8

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
            ValueError: there are fewer shares than processes.
        """
        processes = processes or Processes.alone()
        number = max(1, min(_MOST, len(windows) // _LEAST))
        if number < processes.count:
            raise ValueError(
                f"{len(windows)} windows make {number} shares, of at least {_LEAST} each and {_MOST} at most, too few for "
                f"{processes.count} processes: start at most {number}, or calibrate on more windows"
            )
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
        held = {node: _added(*node, lambda low, high: of(low) if high - low == 1 else None) for node in self._nodes()}

        def found(low: int, high: int) -> Sums | None:
            owner = self._owner(low)
            if self._owner(high - 1) != owner:
                return None
            sums = held.pop((low, high)) if owner == self.processes.rank else nothing()
            known = {name: (moments.tokens, moments.cross is not None) for name, moments in sums.items()}
            _, known = self.processes.broadcast({}, known, owner)
            for name, moments in sums.items():
                tokens, with_cross = known[name]
                moments.receive(tokens, with_cross, lambda tensor: self.processes.spread(tensor, owner))
            return sums

        return _added(0, self.number, found)

    def _owner(self, share: int) -> int:
        return next(
            rank for rank in range(self.processes.count) if share in self.processes.share_of(rank, range(self.number))
        )

    def _nodes(self, low: int = 0, high: int | None = None) -> list[tuple[int, int]]:
        """The largest ranges in the order of addition that consist of shares of this process."""
        high = self.number if high is None else high
        if low in self.spans and high - 1 in self.spans:
            return [(low, high)]
        if high - low == 1:
            return []
        middle = (low + high) // 2
        return self._nodes(low, middle) + self._nodes(middle, high)


def _added(low: int, high: int, found: Callable[[int, int], Sums | None]) -> Sums:
    """The sums over shares `low` to `high`: what `found` knows of a range, and what has to be added."""
    sums = found(low, high)
    if sums is None:
        middle = (low + high) // 2
        sums = _added(low, middle, found)
        for name, moments in _added(middle, high, found).items():
            sums[name].add_sums(moments)
    return sums
