"""Good schedules for softmax-weighted sums along a long axis, as attention over a cache is.

The axis is cut in parts of a fixed number of elements, each in programs of its own: how many a row has follows from its own end,
so that neither the rows beside it nor the capacity move a bit.
"""

from __future__ import annotations

from math import prod

from moekit.compile.rules.rows import alone
from moekit.compile.schedule.cuts import cut
from moekit.compile.schedule.directives import Axis, Launch, Loop, Schedule, Split, Tile, Whole, pow2
from moekit.compile.schedule.facts import PART, axis_uses, equally_deep, once, operands
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Node

EACH = 256  # elements of a part
STEPS = {2: 64, 4: 16}  # of them at a time, by the bytes of a value: float32 is multiplied by lanes, which hold all of a block
MOST_STAGES = 3
MERGED_COLUMNS = 64  # of a program that puts parts together


@once
def weighed(graph: Graph) -> Schedule | None:
    """The schedule of a graph whose first fold over a static axis is a softmax-weighted sum of rows; else None."""
    for node in map(graph.nodes.__getitem__, graph.live()):
        if node.op == "exp_sum" and (found := _sides(graph, node)) and graph.axes[node.attr("axis")]:
            schedule = _schedule(graph, node, *found)
            return schedule if legal(graph, schedule) is None else None
    return None


def _sides(graph: Graph, node: Node) -> tuple[str, str] | None:
    """The axis of the rows that share values, and that of the values' columns; None where there is not one of each."""
    scores, values = (set(graph.nodes[a].axes) for a in operands(node))
    rows, columns = graph.ordered(scores - values), graph.ordered(values - scores)
    return (rows[0], columns[0]) if len(rows) == len(columns) == 1 else None


def _schedule(graph: Graph, node: Node, rows: str, columns: str) -> Schedule:
    axis = node.attr("axis")
    size = max(itemsize(graph.nodes[a].dtype) for a in operands(node)[1:])
    said: dict[str, Axis] = {axis: Loop(axis, STEPS[size]), rows: Tile(rows, max(MEASURED.matrix, min(64, pow2(graph.axes[rows] or 64))))}
    first = _launch(graph, said, columns, size)
    count = -(-(graph.axes[axis] or 0) // EACH)
    if count < 2 or not equally_deep(graph, axis):
        return Schedule((first,))
    split = Split(axis, count, EACH)
    before, rest, _ = cut(graph, split)
    held = (Tile(a, min(MERGED_COLUMNS, pow2(u.extent or 1)) if a == columns else 1) if u.parallel else Loop(a, 1) for a, u in axis_uses(rest).items())
    return Schedule((_launch(before, said, columns, size).but(split), alone(held, warps=2, stages=1)))


def _launch(graph: Graph, said: dict[str, Axis], columns: str, size: int) -> Launch:
    """One section: other axes one by one where programs can have them so, else whole."""
    uses, held = axis_uses(graph), []
    for a, use in uses.items():
        alone_ = Tile(a, 1) if use.parallel and a != columns else Whole(a, max(MEASURED.matrix, pow2(use.extent or 1)))
        held.append(said.get(a, alone_))
    block = {d.axis: d.block for d in held}
    loaded = [n for n in map(graph.nodes.__getitem__, graph.live()) if n.op == "read" and set(said) - {PART} & set(n.axes)]
    turn = sum(prod(block[a] for a in n.axes) * itemsize(n.dtype) for n in loaded if any(isinstance(said.get(a), Loop) for a in n.axes))
    stages = max(1, min(MOST_STAGES, MEASURED.shared_memory * 9 // 10 // max(1, turn)))
    return alone(held, warps=4, stages=stages)
