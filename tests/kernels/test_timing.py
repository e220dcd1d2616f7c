"""The arithmetic of timing, on a device whose clock advances only when a call is made."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hf_pcdvq_kernels.triton import timing


@pytest.fixture
def device(monkeypatch):
    """A device that is not a CPU and has no graphs; `work(seconds)` is a call on it."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.seconds = now[0]

        def elapsed_time(self, other):
            return 1000 * (other.seconds - self.seconds)

    def work(seconds):
        now[0] += seconds

    module = SimpleNamespace(device=lambda _: nullcontext(), Event=Event, synchronize=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return SimpleNamespace(torch=torch.device("xpu"), work=work)


@pytest.mark.parametrize("seconds", [[2.0], [1.0, 3.0, 2.0], [1.0, 3.0] * 20])
def test_time_is_that_of_one_call(device, seconds):
    calls = [partial(device.work, each) for each in seconds]
    assert timing.seconds_per_call(calls, device.torch) == pytest.approx(2.0)


def test_few_calls_are_repeated_and_weights_are_taken_in_turn(device):
    made = []
    timing.seconds_per_call([partial(made.append, number) for number in range(3)], device.torch)
    turns, rest = divmod(len(made), 3)
    assert rest == 0 and made == [0, 1, 2] * turns
    runs = 2 * (timing.REPLAYS + 2)  # each is preceded by an untimed one
    assert len(made) >= runs * timing.LEAST_CALLS


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(timing, "seconds_per_call", lambda calls, device: calls[0]() is not None and 0.5)
    assert timing.copy_rate(torch.device("cpu"), 1000) == 4000
