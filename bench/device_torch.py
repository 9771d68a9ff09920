"""How long PyTorch calls take on a GPU; where there is none the host's clock stands for it, so that a bench can be tried."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moekit.tune import timer


def captured(calls: Sequence[Callable[[], object]]) -> Any:
    """Calls in one graph, to be timed; without a GPU they are only made."""
    if torch.cuda.is_available():
        return timer.capture(calls)
    return sum(awaited(call)[1] for call in calls) / len(calls) * 1e3


def replayed(
    graphs: Mapping[str, Any], rounds: int, links: int = 1, before: Callable[[], object] | None = None
) -> dict[str, dict]:
    """µs (`us`) and interquartile range (`spread`) of each side, all replayed in turn; over `links` if a call is a chain.

    before: what is dispatched ahead of each replay, outside its time.
    """
    if torch.cuda.is_available():
        timings = timer.replay(graphs, rounds, before)
    else:
        timings = {side: timer.Timing(us, 0.0) for side, us in graphs.items()}
    return {side: {"us": round(t.us / links, 3), "spread": round(t.spread / links, 3)} for side, t in timings.items()}


def awaited(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, and the ms that it takes by the host's clock and between two events of the GPU."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        found, ms = call(), (time.perf_counter() - begin) * 1e3
        return found, ms, ms
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    found = call()
    end.record()
    torch.cuda.synchronize()
    return found, (time.perf_counter() - begin) * 1e3, start.elapsed_time(end)


def launches(call: Callable[[], object]) -> int:
    """How many kernels a call runs, copies and fills left out; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        awaited(call)
    return sum(e.count for e in seen.key_averages() if e.device_type.name == "CUDA" and "mem" not in e.key.lower())
