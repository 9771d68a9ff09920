"""The parts of the timer that need no GPU, and on a GPU that it times what it says."""

import pytest
import torch

from moekit.tune.timer import LARGEST_GRAPH, ROTATED_BYTES, Timing, capture, copies_needed, microseconds, replay


def test_a_timing_is_the_median_and_the_interquartile_range():
    """One slow replay moves neither far; a single one has no spread."""
    timing = Timing.of([1.0, 1.1, 1.2, 1.3, 50.0])
    assert timing.us == 1.2
    assert timing.spread > 0
    assert Timing.of([2.0]) == Timing(2.0, 0.0)
    assert Timing.of([1.0] * 9 + [50.0]) == Timing(1.0, 0.0)


@pytest.mark.parametrize("size", [0, 1, 4096, 2**20, 2**28, 2**34])
def test_copies_cover_the_bytes_or_fill_the_graph(size):
    """At least two sets, at most what a graph holds, and 180 MiB wherever that is fewer."""
    count = copies_needed(size)
    assert 2 <= count <= LARGEST_GRAPH
    assert count * size >= ROTATED_BYTES or count == LARGEST_GRAPH


@pytest.mark.gpu
def test_it_times_what_a_call_takes_and_holds_what_it_returns():
    """A kernel that waits for so many cycles takes as long at least as a clock of 2.5 GHz says; and, at the best moment, since
    other tests share the GPU, not twenty times as long as one of 1 GHz does. Outputs of a graph are held apart.
    """
    cycles = {"short": 100_000, "long": 1_000_000}
    sides = {name: capture([lambda n=n: torch.cuda._sleep(n)] * 4) for name, n in cycles.items()}
    rounds = [replay(sides, 7) for _ in range(5)]
    for name, n in cycles.items():
        least = min(times[name].us for times in rounds)
        assert n / 2500 < least < 20 * n / 1000
    held = torch.ones(2**20, device="cuda")
    assert len({x.data_ptr() for x in capture([held.clone] * 4).results}) == 4
    assert microseconds([torch.zeros(1, device="cuda").zero_] * 50) < 1000
