"""Choosing one option for every group so that the sum of losses is small and the sum of bytes within a limit.

A knapsack problem, solved by dynamic programming over the bytes above the smallest options, in the largest unit that all
differences share. Where that makes too many cells, a coarser unit to which differences are rounded up; exchanges then
spend the bytes that rounding left: as long as there is one, the best change of a group, or of two at once, that saves loss
and fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_CELLS = 1 << 16


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
    smallest = [min(option.nbytes for option in options) for options in groups]
    room = limit - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest options take {limit - room} bytes, more than the limit of {limit}")
    costs = [[option.nbytes - least for option in options] for options, least in zip(groups, smallest)]
    losses = [[option.loss for option in options] for options in groups]
    chosen = _knapsack(costs, losses, room)
    room -= sum(cost[index] for cost, index in zip(costs, chosen))
    while (change := _best_exchange(groups, chosen, room)) is not None:
        for group, index in change:
            room += groups[group][chosen[group]].nbytes - groups[group][index].nbytes
            chosen[group] = index
    return chosen


def _knapsack(costs: list[list[int]], losses: list[list[float]], room: int) -> list[int]:
    """The options with the least sum of losses, of those whose costs in whole units are together within the room."""
    unit = max(math.gcd(*(cost for options in costs for cost in options)), -(-room // _CELLS), 1)
    cells = room // unit + 1
    least = torch.zeros(cells, dtype=torch.float64)  # by the units that may be spent on the groups so far
    taken = []
    for options, loss in zip(costs, losses):
        tried = torch.full((len(options), cells), torch.inf, dtype=torch.float64)
        for index, cost in enumerate(options):
            start = -(-cost // unit)
            if start < cells:
                tried[index, start:] = least[: cells - start] + loss[index]
        least, best = tried.min(0)
        taken.append(best.to(torch.uint8))
    chosen, left = [], cells - 1
    for options, best in zip(reversed(costs), reversed(taken)):
        chosen.append(int(best[left]))
        left -= -(-options[chosen[-1]] // unit)
    return chosen[::-1]


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
    negligible = 1e-12 * sum(
        options[now].loss for options, now in zip(groups, chosen)
    )  # not for ever in a circle of roundings
    best_single = single.min().item()
    best_pair = pairs.min().item() if len(down) else torch.inf
    if min(best_single, best_pair) >= -negligible:
        return None
    if best_single <= best_pair:
        return [moves[int(single.argmin())][:2]]
    first, second = divmod(int(pairs.argmin()), len(moves))
    return [moves[int(down[first])][:2], moves[second][:2]]
