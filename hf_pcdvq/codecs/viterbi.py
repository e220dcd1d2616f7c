"""The rings of bits of the stream layout that leave nearly the least squared error: a Viterbi search over their windows.

A window of `L` bits moves on by the `k` new bits of the next weight. What two neighbouring windows share are `L - k`
bits, the trellis state between them; a window `w` leads from state `w >> k` to state `w mod 2^(L - k')`, where `k'` are
the new bits of the weight after it. For every state the search keeps the least error of all paths that lead there.

In a ring the path has to end in the state in which it began. That state is found first, by a search without the
condition over a stretch of `OVERLAP` weights on either side of the ring's border; the search over the whole ring is
exact, given that state. (Trying all states would take a search for each.)

`search` chooses the implementation: a Triton kernel on a GPU, on a CPU compiled loops where Numba is installed, otherwise
the PyTorch operations in this file, which are the reference for both.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from hf_pcdvq_kernels.formats import STREAM_RING, StreamLayout
from torch import Tensor

# Weights on either side of a ring's border that decide the state there. At 2 bits and windows of 12 the squared error is
# 0.4 % above that of an endless stream with 48 of them, 0.1 % with 96.
OVERLAP = 96
# Larger than any error, and still finite in float32: the errors of paths that must not be taken.
FORBIDDEN = 1e30
# Floats that the reference keeps for the windows of one weight, over all rings that it searches at a time.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ACCELERATOR = 1 << 22


def search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout) -> Tensor:
    """Windows of nearly the least `sum of cost * (value of the window - target)^2` over every ring.

    Args:
        targets: float32 `[C, N]`, `N` a multiple of the layout's period; rings of 256 run along the second dimension,
            the last one may be shorter.
        cost: float32 `[N]`, not negative.
        values: float32 `[2^L]`, of all windows.

    Returns:
        int32 `[C, N]`; in every ring each window continues the one before it, and the first one the last.
    """
    device = targets.device.type
    try:
        if device in ("cuda", "xpu"):
            from . import viterbi_triton

            return viterbi_triton.search(targets, cost, values, layout, OVERLAP)
        if device == "cpu":
            from . import viterbi_numba

            return viterbi_numba.search(targets, cost, values, layout, OVERLAP)
    except ImportError as reason:
        wanted = "Numba (pip install 'hf_pcdvq[stream]')" if device == "cpu" else "Triton"
        warnings.warn(
            f"encoding the stream layout takes many times as long without {wanted}, which cannot be imported: {reason}",
            stacklevel=2,
        )
    return reference_search(targets, cost, values, layout)


def rings(rows: int) -> Iterator[tuple[int, int]]:
    """Start and end of every ring of `rows` weights."""
    return ((start, min(start + STREAM_RING, rows)) for start in range(0, rows, STREAM_RING))


def reference_search(targets: Tensor, cost: Tensor, values: Tensor, layout: StreamLayout) -> Tensor:
    """`search` in PyTorch operations, on any device."""
    found = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    chunk = max(1, _ELEMENTS.get(targets.device.type, _ELEMENTS_ACCELERATOR) >> layout.window)
    for start, stop in rings(targets.shape[1]):
        for part in torch.arange(len(targets), device=targets.device).split(chunk):
            found[part, start:stop] = _Ring(targets[part, start:stop], cost[start:stop], values, layout).search()
    return found


class _Ring:
    """The same ring of several inputs: `targets` `[C, R]`."""

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
        return 1 << (self.layout.window - self._stride(row))

    def _errors(self, row: int) -> Tensor:
        """The weighted squared error of every window at a row, `[C, 2^L]`."""
        return (self.values - self.targets[:, row, None]).square_().mul_(self.cost[row])

    def _forward(self, rows: list[int], start: Tensor) -> list[Tensor]:
        """Least errors of the paths to every state, `[C, states]`: before the first row, ..., behind the last one."""
        errors = [start]
        for row in rows:
            error = self._errors(row)
            error.view(len(error), -1, 1 << self._stride(row)).add_(errors[-1][..., None])
            errors.append(error.view(len(error), -1, self._states(row + 1)).amin(1))
        return errors

    def _back(self, rows: list[int], errors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """The best path to `state` `[C]` behind the last row: its windows int32 `[C, rows]`, and where it began."""
        windows = state.new_empty(len(state), len(rows), dtype=torch.int32)
        for i in reversed(range(len(rows))):
            stride, behind = self._stride(rows[i]), self._stride(rows[i] + 1)
            high = torch.arange(1 << behind, device=state.device) << (self.layout.window - behind)
            candidates = high | state[:, None]
            error = (self.values[candidates] - self.targets[:, rows[i], None]).square() * self.cost[rows[i]]
            error += errors[i].gather(1, candidates >> stride)
            window = candidates.gather(1, error.argmin(1, keepdim=True))[:, 0]
            windows[:, i] = window
            state = window >> stride
        return windows, state
