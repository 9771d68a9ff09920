"""How much a sum over ranks may be of: what mailboxes have room for, and how many programs wait for each other at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile.schedule.cost import programs
from moekit.compile.schedule.cuts import launched
from moekit.compile.schedule.directives import Schedule
from moekit.compile.schedule.legal import largest_tile
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.graph import Graph

SURE_WARPS = 8  # for which an SM has registers whatever the compiler takes: 65,536, of which a thread has 256 at most


RESERVED = 2**10  # bytes of shared memory that a program takes besides, for its sums over warps and for the system


def at_once(resident: int, warps: int, tile: int) -> int:
    """How many programs of so many warps, whose largest block has `tile` elements, are sure to be on a device of `resident` SMs
    at once: as registers go, and as shared memory does, which holds a block where lanes exchange its elements."""
    return resident * max(1, min(SURE_WARPS // warps, MEASURED.shared_memory // (4 * tile + RESERVED)))


@dataclass(frozen=True)
class Room:
    """Mailboxes of `ranks` ranks over mesh axis `axis`, for `rows` rows of `width` elements; a device has `resident` SMs, each
    with room for a program of any kernel."""

    axis: str
    ranks: int
    rows: int
    width: int
    resident: int

    def refuses(self, graph: Graph, sizes: Mapping[str, int], schedule: Schedule) -> str | None:
        """Why a graph cannot add up by these mailboxes, in a sentence; None if it can."""
        if graph.ranks != {self.axis: self.ranks}:
            said = ", ".join(f"{n} ranks over {a}" for a, n in graph.ranks.items())
            return f"it adds up over {said}, the mailboxes are those of {self.ranks} ranks over {self.axis}"
        for n in graph.live_nodes("all_reduce"):
            rows, *others = graph.nodes[n.args[0]].axes
            if sizes[rows] > self.rows:
                return f"the mailboxes have room for {self.rows} rows, the call has {sizes[rows]}"
            if (width := prod(sizes[a] for a in others)) > self.width:
                return f"the mailboxes have room for rows of {self.width} elements, the call's have {width}"
        for launch, g, _ in launched(graph, schedule):
            if not g.ranks:
                continue
            most, tile = programs(g, launch, sizes), largest_tile(g, launch.sections[0])
            fit = at_once(self.resident, launch.warps, tile)
            if most > fit:
                return f"{most} programs wait for each other, of which a device has {fit} at once"
        return None
