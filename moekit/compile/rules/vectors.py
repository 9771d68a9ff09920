"""Good schedules for rows' products with a matrix that lanes add up: some of its rows a program, each whole.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from math import prod

from moekit.compile.rules.rows import alone, other_axis, shrunk
from moekit.compile.schedule.directives import Axis, Launch, Loop, Tile, Warps, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, once
from moekit.lang.graph import Graph, Node

MATRIX_TILE = 2**13  # elements of a matrix that a program has
EACH_WARP = 2**11  # of them, all under way at once


@once
def vector_launch(graph: Graph) -> Launch | None:
    """Programs of a graph whose one long sum is of products of rows with a matrix's; None of another graph."""
    found = [each for n in graph.live_nodes("reduce") if (each := _summed(graph, n))]
    if len({*found}) != 1:
        return None
    return _launch(graph, *found[0], MATRIX_TILE // pow2(len(found)))


def _summed(graph: Graph, node: Node) -> tuple[tuple[str, ...], str] | None:
    """The axes along which a matrix's products with rows are added up, in blocks or not, and its parallel one beside them."""
    uses = axis_uses(graph)
    if node.attr("kind") != "sum" or graph.nodes[node.args[0]].op != "mul":
        return None
    sides = [set(graph.nodes[a].axes) for a in graph.nodes[node.args[0]].args]
    own = [graph.ordered(a - b) for a, b in (sides, sides[::-1])]
    deep = graph.ordered({a for a in sides[0] & sides[1] if uses[a].reduced})
    if not all(own) or node.attr("axis") not in deep or prod(graph.axes[a] or 0 for a in deep) < EACH_WARP // 8:
        return None
    static = [a for axes in own for a in axes if graph.axes[a] is not None and uses[a].parallel]
    return (tuple(deep), static[0]) if len(static) == 1 else None


def _launch(graph: Graph, deep: tuple[str, ...], columns: str, tile: int) -> Launch:
    """A matrix's rows whole, so many a program that it has `tile` elements; one of what else is parallel."""
    uses, held = axis_uses(graph), 1
    said: dict[str, Axis] = {}
    for axis in reversed(deep):  # the innermost first; what has no room goes in turns
        depth = pow2(uses[axis].extent or 1)
        said[axis] = Whole(axis, depth) if held * depth <= tile else Loop(axis, max(1, tile // held))
        held *= said[axis].block
    said[columns] = Tile(columns, max(1, min(tile // held, pow2(uses[columns].extent or 1))))
    launch = shrunk(graph, alone((said.get(a) or other_axis(u) for a, u in uses.items()), stages=1))
    return launch.but(Warps(max(1, min(4, held * said[columns].block // (tile // 4)))))
