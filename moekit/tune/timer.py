"""The one timer of moekit's benches and tuning: CUDA graphs of many calls on rotated inputs, median of many replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROTATED_BYTES = 180 * 2**20  # three times the 60 MB L2 of an H200, so that no call finds its inputs there
LARGEST_GRAPH = 400


def copies_needed(bytes_per_call: int) -> int:
    """How many sets of inputs to rotate among so that the L2 does not answer."""
    return max(2, min(LARGEST_GRAPH, -(-ROTATED_BYTES // max(1, bytes_per_call))))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 30, warmup: int = 3) -> float:
    """Median time of one call: all `calls` (each on inputs of its own) captured in one graph, replayed `replays` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:warmup]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)
