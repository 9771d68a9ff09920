"""How many programs are sure to be on a device at once, and what mailboxes have no room for."""

import pytest

from moekit.compile.schedule import Schedule
from moekit.compile.schedule.room import Room, at_once

from .test_exchange import bound


@pytest.mark.parametrize(("warps", "tile", "each"), [
    (1, 128, 8), (2, 2048, 4), (4, 2048, 2), (8, 2048, 1), (16, 2048, 1), (32, 2**14, 1), (1, 8192, 6), (2, 2**14, 3),
    (1, 2**17, 1),
])  # fmt: skip
def test_programs_at_once(warps, tile, each):
    """As many as have 256 registers a thread, the most there are, and a block in shared memory; one of any kernel."""
    assert at_once(132, warps, tile) == 132 * each


def test_what_is_refused():
    """More programs than fit, and more rows than there is room for."""
    graph, sizes = bound(2, 2048, "bfloat16", rows=300)
    room, few = Room("tp", 2, 400, 2048, 132), Schedule.parse("tile:T:1 whole:H:2048 warps:2")
    assert room.refuses(graph, sizes, few) is None
    more = Schedule.parse("tile:T:1 whole:H:2048 warps:4")
    assert "300 programs wait for each other, of which a device has 264 at once" in str(room.refuses(graph, sizes, more))
    assert "room for 200 rows, the call has 300" in str(Room("tp", 2, 200, 2048, 132).refuses(graph, sizes, few))
