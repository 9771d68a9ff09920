"""A good schedule for products in a row whose last is what the first began with: a state that a program keeps while it goes on.

What earned the numbers stands in measured.json.
"""

from __future__ import annotations

from moekit.compile.rules.folds import FOR_LOADS, MOST_STAGES
from moekit.compile.rules.rows import alone, other_axis
from moekit.compile.schedule.cost import in_flight
from moekit.compile.schedule.directives import Axis, Launch, Stages, Tile, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, gemms, once
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.graph import Graph, made_of

MOST_HELD = 128  # elements along each axis of a state and of what it is multiplied by
STATE_COLUMNS = 16  # of a state that a program has: few, so that one sequence's heads are programs for the whole GPU


@once
def chained(graph: Graph) -> Launch | None:
    """Programs that hold all of a state but for some of its columns; None where no product's sum runs along its rows."""
    found, uses = gemms(graph), axis_uses(graph)
    if not _in_a_row(graph) or not {g.k for g in found.values()} & {a for w in graph.writes for a in graph.nodes[w.value].axes}:
        return None
    columns = set.intersection(*({g.m, g.n} for g in found.values())) - {g.k for g in found.values()}
    held = {a for g in found.values() for a in (g.m, g.n, g.k)} - columns
    large = any((uses[a].extent or MOST_HELD + 1) > MOST_HELD for a in held)
    if len(columns) != 1 or (large and not any(u.in_turns for u in uses.values())):
        return None
    (column,) = columns
    extent = uses[column].extent or STATE_COLUMNS
    said: dict[str, Axis] = {a: Whole(a, max(MEASURED.matrix, pow2(uses[a].extent or 1))) for a in held}
    said[column] = Tile(column, max(MEASURED.matrix, min(STATE_COLUMNS, pow2(extent))))
    launch = alone((said.get(a) or other_axis(u) for a, u in uses.items()), stages=1)
    held = in_flight(graph, launch.sections[0])
    return launch.but(Stages(max(1, min(MOST_STAGES, FOR_LOADS // held)))) if held else launch


def _in_a_row(graph: Graph) -> bool:
    """Whether some product is of what another product made."""
    products = {*gemms(graph)}
    return any(products & made_of(graph.nodes, *graph.nodes[i].args) for i in products)
