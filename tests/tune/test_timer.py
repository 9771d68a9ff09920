"""The parts of the timer that need no GPU, and on a GPU that it times what it says."""

import time

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
def test_it_times_a_copy_near_its_bandwidth_and_sides_in_turn():
    """A copy twice as large takes about twice as long in some round: other tests share the GPU and can spoil any of them, but a
    timer that is wrong is wrong in all; outputs of a graph are held apart.
    """
    small, large = (torch.ones(n * 2**24, device="cuda") for n in (4, 8))
    sides = {"small": capture([small.clone] * 4), "large": capture([large.clone] * 4)}
    for _ in range(30):
        times = replay(sides, 7)
        ratio, rate = times["large"].us / times["small"].us, 2 * small.nbytes / times["small"].us / 1e6
        if right := 1.6 < ratio < 2.4 and 0.3 < rate < 10:
            break
        time.sleep(0.3)
    assert right, (ratio, rate)
    assert len({x.data_ptr() for x in sides["small"].results}) == 4
    assert microseconds([torch.zeros(1, device="cuda").zero_] * 50) < 50
