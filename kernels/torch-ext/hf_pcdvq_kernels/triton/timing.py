"""Time per call on a device, with weights read from memory rather than a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD = 1 << 29  # bytes of weights read between two uses of the same one: ten times the L2 cache of an H200
MOST_COPIES = 256
REPLAYS = 10
LEAST_CALLS = 16  # timed together on a GPU, where events and graph launches take microseconds themselves
COPIED = 1 << 30  # bytes


def copies(nbytes: int) -> int:
    """Number of copies of a weight of this size to cycle through."""
    return max(1, min(MOST_COPIES, -(-COLD // nbytes)))


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median time of one of `calls`, which run in sequence, each on its own weight.

    On NVIDIA and AMD all of them are captured in one CUDA graph, so that launch overhead in Python does not count; on
    a CPU it is wall-clock time.
    """
    if device.type == "cpu":
        calls[0]()
        return statistics.median(_wall(calls) for _ in range(REPLAYS)) / len(calls)
    module = torch.get_device_module(device)
    calls = [*calls] * -(-LEAST_CALLS // len(calls))
    with module.device(device):
        run = _captured(calls) if device.type == "cuda" else lambda: [call() for call in calls]
        times = []
        for _ in range(REPLAYS + 2):  # the first two warm up
            start, stop = module.Event(enable_timing=True), module.Event(enable_timing=True)
            run()  # keeps the device busy while the host launches the timed run
            start.record()
            run()
            stop.record()
            module.synchronize()
            times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times[2:]) / len(calls)


def copy_rate(device: torch.device, nbytes: int = COPIED) -> float:
    """Bytes per second, read plus written, of a copy within the memory of a device."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_per_call([lambda: target.copy_(source)], device)


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and cuBLAS is set up before the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
