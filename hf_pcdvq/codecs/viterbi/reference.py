"""`viterbi.search` in PyTorch operations, on any device: the reference for the other implementations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_pcdvq_kernels.formats.stream import STREAM_RING, StreamLayout
from torch import Tensor

# Weights on either side of a ring's boundary that determine the state there. At 2 bits and windows of 12 bits, the
# squared error is 0.4 % above that of an endless stream with 48 of them, 0.1 % with 96.
OVERLAP = 96
# The error of forbidden paths: larger than any real error, yet finite in float32.
FORBIDDEN = 1e30
# Floats held for the windows of one weight, over all rings searched at a time.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ACCELERATOR = 1 << 22


def rings(rows: int) -> Iterator[tuple[int, int]]:
    """Start and end of every ring of `rows` weights."""
    return ((start, min(start + STREAM_RING, rows)) for start in range(0, rows, STREAM_RING))


def search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout) -> Tensor:
    """See `viterbi.search`."""
    found = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    chunk = max(1, _ELEMENTS.get(targets.device.type, _ELEMENTS_ACCELERATOR) >> layout.window_bits)
    for start, stop in rings(targets.shape[1]):
        for part in torch.arange(len(targets), device=targets.device).split(chunk):
            found[part, start:stop] = _Ring(targets[part, start:stop], cost[start:stop], values, layout).search()
    return found


class _Ring:
    """One ring of `R` weights for `C` inputs: `targets` `[C, R]`."""

    def __init__(self, targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout):
        self.targets, self.cost, self.values, self.layout = targets, cost, values, layout
        self.length = targets.shape[1]

    def search(self) -> Tensor:
        """Windows int32 `[C, R]`."""
        around = [row % self.length for row in range(-OVERLAP, OVERLAP)]
        free = self.targets.new_zeros(len(self.targets), self._states(around[0]))
        errors = self._forward(around, free)
        state = self._back(around[OVERLAP:], errors[OVERLAP:], errors[-1].argmin(1))[1]

        tied = torch.full_like(free[:, :1], FORBIDDEN).repeat(1, self._states(0))
        tied.scatter_(1, state[:, None], 0)
        rows = list(range(self.length))
        return self._back(rows, self._forward(rows, tied), state)[0]

    def _stride(self, row: int) -> int:
        return self.layout.strides[row % self.length % len(self.layout.strides)]

    def _states(self, row: int) -> int:
        """Number of states before a row."""
        return 1 << (self.layout.window_bits - self._stride(row))

    def _errors(self, row: int) -> Tensor:
        """The weighted squared error of every window for a row, `[C, 2^L]`."""
        return (self.values - self.targets[:, row, None]).square_().mul_(self.cost[row])

    def _forward(self, rows: list[int], start: Tensor) -> list[Tensor]:
        """Least errors of the paths to every state, `[C, states]`: before the first row, ..., after the last one."""
        errors = [start]
        for row in rows:
            error = self._errors(row)
            error.view(len(error), -1, 1 << self._stride(row)).add_(errors[-1][..., None])
            errors.append(error.view(len(error), -1, self._states(row + 1)).amin(1))
        return errors

    def _back(self, rows: list[int], errors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """The best path to `state` `[C]` after the last row: its windows int32 `[C, rows]`, and its initial state."""
        windows = state.new_empty(len(state), len(rows), dtype=torch.int32)
        for i in reversed(range(len(rows))):
            stride, next_stride = self._stride(rows[i]), self._stride(rows[i] + 1)
            high = torch.arange(1 << next_stride, device=state.device) << (self.layout.window_bits - next_stride)
            candidates = high | state[:, None]
            error = (self.values[candidates] - self.targets[:, rows[i], None]).square() * self.cost[rows[i]]
            error += errors[i].gather(1, candidates >> stride)
            window = candidates.gather(1, error.argmin(1, keepdim=True))[:, 0]
            windows[:, i] = window
            state = window >> stride
        return windows, state
