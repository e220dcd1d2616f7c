"""Timing of benchmarks/bench_cpu.py: what is compared runs alternately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

SAMPLE = 0.03  # least seconds of calls that are timed together

Call = Callable[[], object]


def timed(call: Call, times: int = 1) -> Callable[[], float]:
    """A function that makes calls and returns the seconds of one."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - started) / times

    return run


def repeated(calls: list[Call]) -> Callable[[], float]:
    """The same for calls in turn, enough of them to be timed well, each time going on where the last time ended."""
    turns = cycle(calls)
    once = timed(lambda: next(turns)())
    with torch.no_grad():
        for _ in calls:  # the first call of each prepares
            once()
        seconds = min(once(), once())
    return timed(lambda: next(turns)(), max(1, round(SAMPLE / seconds)))


def alternated(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after a round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            with torch.no_grad():
                seconds = run()
            if number:
                times[name].append(seconds)
    return times


def compared(times: dict[str, list[float]], name: str, against: str) -> dict[str, Any]:
    """Medians and best times of two, and how many times as fast the first is."""
    own, other = times[name], times[against]
    return {
        "against": against,
        "ratio": statistics.median(b / a for a, b in zip(own, other, strict=True)),
        "ratio_of_best": min(other) / min(own),
        "seconds": statistics.median(own),
        "best_seconds": min(own),
        "against_seconds": statistics.median(other),
        "against_best_seconds": min(other),
        "rounds": len(own),
    }
