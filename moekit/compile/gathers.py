"""Good schedules for products with gathered matrices that are then added up: a routed expert's down projection.

Every pair of a row and one of its matrices has programs of its own, so that one row alone gives programs enough, and a second
launch adds up a row's pairs in their order. A program reads 128 bytes of each of a matrix's rows.
"""

from __future__ import annotations

from moekit.compile.analysis import axis_uses
from moekit.compile.fit import other_axis
from moekit.compile.schedule import Schedule, legal, pow2
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Along, By, Graph, Node

# Measured on an H200 as Pallas kernels (10 of 512 experts, I → 2048, bfloat16), µs, and what the bytes of the distinct experts
# take at 4.2 TB/s. I = 256, T = 1, 8, 32: 7.0, 26.6, 89.3 of 2.5, 18.5, 58.9; with all pairs of a row in one program, the
# best with blocks of 16 columns, 12.6, 56.0, 198. I = 512, T = 1, 16: 10.7, 91.0 of 5.0, 68.7. I = 64, T = 1, 32: 4.9, 25.4 of
# 0.6, 14.7.
COLUMNS_BYTES = 128
MOST_WHOLE, STEP = 512, 64  # of the contracted axis: in one block up to so many, else so many at a time
MOST_PAIRS = 64


def gathered_product(graph: Graph) -> Schedule | None:
    """The schedule of a graph whose gathered matrices have their columns side by side in memory; None for other graphs."""
    uses = axis_uses(graph)
    for node in (graph.nodes[i] for i in graph.live()):
        found = _columns(graph, node) if node.op == "contract" else None
        pairs = [a for a, u in uses.items() if found and a in node.axes and u.reduced and 1 < (u.extent or 0) <= MOST_PAIRS]
        if not found or len(pairs) != 1 or not uses[found].parallel:
            continue
        size = max(itemsize(graph.nodes[a].dtype) for a in node.args)
        deep, over = uses[node.attr("axis")].extent, node.attr("axis")
        whole = deep is not None and pow2(deep) <= MOST_WHOLE
        said = {found: ("grid", min(COLUMNS_BYTES // size, pow2(uses[found].extent or 1))), pairs[0]: ("loop", 1)}
        said[over] = ("whole", pow2(deep or 1)) if whole else ("loop", STEP)
        axes = tuple((a, *said[a]) if a in said else other_axis(u) for a, u in uses.items())
        split = ((pairs[0], uses[pairs[0]].extent or 1),)
        schedule = Schedule(axes, split, warps=4, stages=1 if whole else 3)
        return schedule if legal(graph, schedule) is None else None
    return None


def _columns(graph: Graph, node: Node) -> str | None:
    """The innermost axis of a gathered operand of a contraction, if that does not run along it."""
    for read in (graph.nodes[a] for a in node.args):
        if read.op != "read" or not any(isinstance(i, By) for i in read.attr("index")):
            continue
        inner = read.attr("index")[-1]
        return inner.axis if isinstance(inner, Along) and inner.axis != node.attr("axis") else None
    return None
