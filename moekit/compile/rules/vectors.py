"""Good schedules for rows' products with a matrix that lanes add up: some of its rows a program, each whole.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from moekit.compile.rules.rows import alone, other_axis, shrunk
from moekit.compile.schedule.directives import Axis, Launch, Loop, Tile, Warps, Whole, pow2
from moekit.compile.schedule.facts import PART, PRODUCTS, axis_uses, once
from moekit.lang.graph import Graph, Node

MATRIX_TILE = 2**13  # elements of a matrix that a program has
EACH_WARP = 2**11  # of them, all under way at once
SUMMED_TILE = 2**12  # of a matrix whose products are added to parts of a sum


@once
def vector_launch(graph: Graph) -> Launch | None:
    """Programs of a graph whose one long sum is of products of rows with a matrix's; None of another graph."""
    found = {(n.attr("axis"), columns) for n in map(graph.nodes.__getitem__, graph.live()) if (columns := _columns(graph, n))}
    if len(found) != 1:
        return None
    ((deep, columns),) = found
    return _launch(graph, deep, columns, MATRIX_TILE)


def _columns(graph: Graph, node: Node) -> str | None:
    """The parallel axis that a matrix has beside the axis along which its products with rows are added up."""
    uses = axis_uses(graph)
    if node.op != "reduce" or node.attr("kind") != "sum" or graph.nodes[node.args[0]].op != "mul":
        return None
    sides = [set(graph.nodes[a].axes) for a in graph.nodes[node.args[0]].args]
    own = [graph.ordered(a - b) for a, b in (sides, sides[::-1])]
    if not all(own) or (graph.axes[node.attr("axis")] or 0) < EACH_WARP // 8:
        return None
    static = [a for axes in own for a in axes if graph.axes[a] is not None and uses[a].parallel]
    return static[0] if len(static) == 1 else None


def summed_launch(graph: Graph) -> Launch | None:
    """Programs that add up parts, and to them products of few rows with a matrix; None of another graph."""
    products = [graph.nodes[i] for i in graph.live() if graph.nodes[i].op in PRODUCTS]
    uses = axis_uses(graph)
    if len(products) != 1 or not any(a.endswith(PART) for a in uses):
        return None
    columns = [a for a in products[0].axes if graph.axes[a] is not None and uses[a].parallel]
    return _launch(graph, products[0].attr("axis"), columns[-1], SUMMED_TILE) if columns else None


def _launch(graph: Graph, deep: str, columns: str, tile: int) -> Launch:
    """A matrix's rows whole, so many a program that it has `tile` elements; one of what else is parallel."""
    uses = axis_uses(graph)
    depth, extent = uses[deep].extent or 1, uses[columns].extent or 1
    said: dict[str, Axis] = {deep: Whole(deep, pow2(depth)) if pow2(depth) <= tile else Loop(deep, tile)}
    said[columns] = Tile(columns, max(1, min(tile // said[deep].block, pow2(extent))))
    launch = shrunk(graph, alone((said.get(a) or other_axis(u) for a, u in uses.items()), stages=1))
    return launch.but(Warps(max(1, min(4, said[deep].block * said[columns].block // (tile // 4)))))
