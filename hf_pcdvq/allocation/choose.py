"""Choosing one option for every group so that the sum of losses is small and the sum of bytes within a limit.

A knapsack problem. First steps up, always the one with the most loss saved per byte that still fits; then exchanges: as
long as there is one, the best change of a group, or of two groups at once, that saves loss and fits. In between the hull of
the options, which is all that the greedy part by itself sees, the exchanges spend the bytes that are left.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Option(NamedTuple):
    """One setting of a group: its bytes, and the loss that is expected of it."""

    nbytes: int
    loss: float


def choose(groups: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """The number of the chosen option of every group.

    Args:
        groups: the options of each, in any order.
        limit: the most bytes of all chosen options together.

    Raises:
        ValueError: even the smallest options take more.
    """
    if not groups:
        return []
    chosen = [min(range(len(options)), key=lambda index: options[index]) for options in groups]
    room = limit - sum(options[index].nbytes for options, index in zip(groups, chosen))
    if room < 0:
        raise ValueError(f"the smallest options take {limit - room} bytes, more than the limit of {limit}")
    room = _greedy(groups, chosen, room)
    while (change := _best_exchange(groups, chosen, room)) is not None:
        for group, index in change:
            room += groups[group][chosen[group]].nbytes - groups[group][index].nbytes
            chosen[group] = index
    return chosen


def _greedy(groups: Sequence[Sequence[Option]], chosen: list[int], room: int) -> int:
    """Take the steps with the most loss saved per byte; returns the bytes that are left."""
    heap: list[tuple[float, int, int]] = []

    def push(group: int) -> None:
        step = _best_step(groups[group], chosen[group], room)
        if step is not None:
            heapq.heappush(heap, (-step[0], group, step[1]))

    for group in range(len(groups)):
        push(group)
    while heap:
        _, group, index = heapq.heappop(heap)
        cost = groups[group][index].nbytes - groups[group][chosen[group]].nbytes
        if cost <= room:
            room -= cost
            chosen[group] = index
        push(group)  # the next step, or a smaller one if this did not fit
    return room


def _best_step(options: Sequence[Option], now: int, room: int) -> tuple[float, int] | None:
    """The step up with the most loss saved per byte among those that fit, with that ratio."""
    steps = []
    for index, option in enumerate(options):
        cost, gain = option.nbytes - options[now].nbytes, options[now].loss - option.loss
        if 0 <= cost <= room and gain > 0:
            steps.append((gain / max(cost, 1), index))
    return max(steps, default=None)


def _best_exchange(groups: Sequence[Sequence[Option]], chosen: list[int], room: int) -> list[tuple[int, int]] | None:
    """The change of one or two groups that saves the most loss and fits, as pairs of group and option."""
    moves = [
        (group, index, option.nbytes - options[now].nbytes, option.loss - options[now].loss)
        for group, (options, now) in enumerate(zip(groups, chosen))
        for index, option in enumerate(options)
        if index != now
    ]
    if not moves:
        return None
    owner = torch.tensor([move[0] for move in moves])
    cost = torch.tensor([move[2] for move in moves], dtype=torch.float64)  # exact up to 2^53 bytes
    loss = torch.tensor([move[3] for move in moves], dtype=torch.float64)
    down = (cost < 0).nonzero()[:, 0]  # of a pair that fits where neither part alone does, one part is smaller
    pairs = loss[down, None] + loss
    pairs[(cost[down, None] + cost > room) | (owner[down, None] == owner)] = torch.inf
    single = torch.where(cost <= room, loss, torch.inf)
    least = 1e-12 * sum(
        options[now].loss for options, now in zip(groups, chosen)
    )  # not for ever in a circle of roundings
    best_single = single.min().item()
    best_pair = pairs.min().item() if len(down) else torch.inf
    if min(best_single, best_pair) >= -least:
        return None
    if best_single <= best_pair:
        return [moves[int(single.argmin())][:2]]
    first, second = divmod(int(pairs.argmin()), len(moves))
    return [moves[int(down[first])][:2], moves[second][:2]]
