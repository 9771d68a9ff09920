"""The one timer of moekit's benches and tuning: CUDA graphs of many calls on rotated inputs, median of many replays.

Every call of a graph has operands of its own and its outputs are held, and between two replays more memory is read than the L2
holds, so that no call finds its operands there. The sides of a ratio are replayed in turn, so that both see the same machine.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROTATED_BYTES = 180 * 2**20  # three times the 60 MB L2 of an H200
FLUSHED_BYTES = 256 * 2**20
LARGEST_GRAPH = 200

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over replays, and the interquartile range of the replays."""

    us: float
    spread: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """The timing that replays of so many microseconds amount to."""
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        return cls(statistics.median(times), quarters[2] - quarters[0])


@dataclass(frozen=True)
class Captured:
    """A graph of `calls` calls. What they returned and the calls themselves are held: the graph reads and writes their memory,

    and capturing another graph gives all that is free back to the device.
    """

    graph: torch.cuda.CUDAGraph
    calls: int
    results: tuple[object, ...]
    held: tuple[Call, ...] = ()


def copies_needed(bytes_per_call: int) -> int:
    """How many sets of operands a graph rotates among: 180 MiB of them, or as many calls as a graph may have."""
    return max(2, min(LARGEST_GRAPH, -(-ROTATED_BYTES // max(1, bytes_per_call))))


def capture(calls: Sequence[Call], warmup: int = 3) -> Captured:
    """All `calls`, each on operands of its own, in one graph; the first few run before, to compile what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:warmup]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tuple(call() for call in calls)
    return Captured(graph, len(calls), results, tuple(calls))


@functools.lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSHED_BYTES // 4, device="cuda", dtype=torch.float32)


def replay(sides: Mapping[str, Captured], rounds: int = 30, before: Callable[[], object] | None = None) -> dict[str, Timing]:
    """The time of one call of each side. A round replays every side once, each after the L2 was filled with something else.

    before: dispatched ahead of each replay, outside its time.
    """
    flush, times = _flush_buffer(), {name: [] for name in sides}
    for side in sides.values():
        side.graph.replay()
    for _ in range(rounds):
        events = {}
        for name, side in sides.items():
            flush.sum()  # takes longer than the host needs to launch what follows, so no gap is timed
            if before is not None:
                before()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            side.graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1000 / sides[name].calls)
    return {name: Timing.of(t) for name, t in times.items()}


def microseconds(calls: Sequence[Call], replays: int = 30, warmup: int = 3) -> float:
    """Median time of one call: all `calls` (each on operands of its own) captured in one graph, replayed `replays` times."""
    return replay({"": capture(calls, warmup)}, replays)[""].us
