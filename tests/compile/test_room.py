"""How many programs are sure to be on a device at once, and what mailboxes have no room for."""

import pytest

from moekit.compile.rules.rows import flagged_rows
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


def test_rows_with_flags_are_taken_by_as_many_programs_as_fit():
    """And by no more than there are rows, where their number is known."""
    graph, _ = bound(2, 2048, "bfloat16")
    said = "tile:T:1 whole:H:2048 flags:tp rounds:T:{} warps:2 stages:1 dependent"
    assert str(flagged_rows(graph, 132)) == said.format(528)
    assert str(flagged_rows(graph, 132, 200)) == said.format(200)
    assert str(flagged_rows(graph, 132, warps=4)) == said.format(264).replace("warps:2", "warps:4")
    assert flagged_rows(bound(2, 300, "bfloat16")[0], 132) is not None  # a lane of two warps has an access of eight elements
    assert flagged_rows(bound(2, 256, "bfloat16")[0], 132) is None
    assert flagged_rows(bound(1, 2048)[0], 132) is None  # one rank adds up nothing


def test_what_is_refused():
    """Packets by the mailboxes of flags, the reverse, and more programs than fit."""
    graph, sizes = bound(2, 2048, "bfloat16", rows=300)
    packets, flags = Room("tp", 2, 400, 2048, 132), Room("tp", 2, 400, 2048, 132, flags=True)
    many, few = flagged_rows(graph, 132), Schedule.parse("tile:T:1 whole:H:2048 warps:2")
    assert flags.refuses(graph, sizes, many) is None
    assert packets.refuses(graph, sizes, few) is None
    assert "rows of the mailboxes are packets, the schedule says tile:T:1" in str(packets.refuses(graph, sizes, many))
    assert "rows of the mailboxes have flags, the schedule says tile:T:1" in str(flags.refuses(graph, sizes, few))
    more = Schedule.parse("tile:T:1 whole:H:2048 warps:4")
    assert "300 programs wait for each other, of which a device has 264 at once" in str(packets.refuses(graph, sizes, more))
    assert "room for 200 rows, the call has 300" in str(Room("tp", 2, 200, 2048, 132, flags=True).refuses(graph, sizes, many))
