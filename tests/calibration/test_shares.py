"""Sums over the shares of windows: the same bits whoever computes them, and few of them in memory at a time."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_pcdvq.calibration.hessian import InputMoments
from hf_pcdvq.calibration.shares import Shares, sums_at_once
from hf_pcdvq.processes import Processes

CPU = torch.device("cpu")
WINDOWS = torch.zeros(128, 4, dtype=torch.int64)  # 16 shares


class Room:
    """Where threads that stand for processes meet."""

    def __init__(self, count):
        self.barrier, self.slot, self.calls = threading.Barrier(count, timeout=20), None, [[] for _ in range(count)]

    def pass_on(self, rank, call, content, source):
        self.calls[rank].append((call, source))
        if rank == source:
            self.slot = content
        self.barrier.wait()
        found = self.slot
        self.barrier.wait()
        return found


class Thread(Processes):
    def __init__(self, rank, count, room):
        self.count, self.rank, self.device, self.room = count, rank, None, room

    def broadcast(self, tensors, note, source):
        return self.room.pass_on(self.rank, "broadcast", (dict(tensors), note), source)

    def spread(self, tensor, source):
        found = self.room.pass_on(self.rank, "spread", tensor.clone(), source)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        tensor.copy_(found)


def nothing():
    return {name: InputMoments(6, CPU, with_change=True) for name in ("compared", "uncompared", "idle")}


def of(share):
    draw, sums = torch.Generator().manual_seed(share), nothing()
    now, before = (torch.randn(1, 9, 6, generator=draw) for _ in range(2))
    sums["compared"].add(now, before)
    sums["uncompared"].add(now, None if share == 7 else before)
    return sums


def contents(sums):
    return {name: (one.hessian, one.cross, one.change, one.tokens) for name, one in sums.items()}


def totals(count):
    room = Room(count)
    with ThreadPoolExecutor(count) as pool:
        made = [Shares.of(WINDOWS, CPU, None, Thread(rank, count, room)) for rank in range(count)]
        found = list(pool.map(lambda shares: contents(shares.total(of, nothing)), made))
    assert all(calls == room.calls[0] for calls in room.calls)
    return found


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_the_bits_do_not_depend_on_who_computes_which_share(count):
    (expected,) = totals(1)
    assert expected["compared"][3] == 16 * 9 and expected["uncompared"][1] is None and expected["idle"][3] == 0
    for found in totals(count):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_process_holds_three_sums():
    alive, most = weakref.WeakSet(), 0

    def counted(share):
        nonlocal most
        sums = of(share)
        alive.add(sums["compared"])
        most = max(most, len(alive))
        return sums

    Shares.of(WINDOWS, CPU).total(counted, nothing)
    assert most == 3 == sums_at_once(1)


def test_without_an_original_there_is_no_room_for_comparing_with_it():
    moments = InputMoments(6, CPU, with_change=True)
    assert moments.cross is None and moments.change is None
    moments.add(torch.ones(1, 2, 6))
    assert moments.cross is None and moments.change is None
