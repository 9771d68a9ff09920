"""Good schedules for products with gathered matrices that are then added up: a routed expert's down projection.

Every pair of a row and one of its matrices has programs of its own, so that one row alone gives programs enough, and a second
launch adds up a row's pairs in their order. A program reads 128 bytes of each of a matrix's rows.
"""

from __future__ import annotations

from moekit.compile.rules.rows import alone, other_axis
from moekit.compile.schedule.directives import Axis, Launch, Loop, Split, Tile, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, equally_deep, once
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Along, By, Graph, Node

COLUMNS_BYTES = 128
MOST_WHOLE, STEP = 512, 64  # of the contracted axis: in one block up to so many, else so many at a time
MOST_PAIRS = 64


@once
def gathered_product(graph: Graph) -> Launch | None:
    """What comes before a split of a graph whose gathered matrices have their columns side by side in memory."""
    uses = axis_uses(graph)
    for node in (graph.nodes[i] for i in graph.live()):
        found = _columns(graph, node) if node.op == "contract" else None
        pairs = [a for a, u in uses.items() if found and a in node.axes and u.reduced and 1 < (u.extent or 0) <= MOST_PAIRS]
        if not found or len(pairs) != 1 or not uses[found].parallel:
            continue
        size = max(itemsize(graph.nodes[a].dtype) for a in node.args)
        deep, over = uses[node.attr("axis")].extent, node.attr("axis")
        whole = deep is not None and pow2(deep) <= MOST_WHOLE
        said: dict[str, Axis] = {found: Tile(found, min(COLUMNS_BYTES // size, pow2(uses[found].extent or 1)))}
        said |= {pairs[0]: Loop(pairs[0], 1), over: Whole(over, pow2(deep or 1)) if whole else Loop(over, STEP)}
        launch = alone((said.get(a) or other_axis(u) for a, u in uses.items()), stages=1 if whole else 3)
        return launch.but(Split(pairs[0], uses[pairs[0]].extent or 1)) if equally_deep(graph, pairs[0]) else None
    return None


def _columns(graph: Graph, node: Node) -> str | None:
    """The innermost axis of a gathered operand of a contraction, if that does not run along it."""
    for read in (graph.nodes[a] for a in node.args):
        if read.op != "read" or not any(isinstance(i, By) for i in read.attr("index")):
            continue
        inner = read.attr("index")[-1]
        return inner.axis if isinstance(inner, Along) and inner.axis != node.attr("axis") else None
    return None
