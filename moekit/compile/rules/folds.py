"""Good schedules for softmax-weighted sums along a long axis, as attention over a cache is.

The axis is cut in parts of a fixed number of elements, each in programs of its own. How many a row has follows from its own
end, so that neither the rows beside it nor the capacity move a bit.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from moekit.compile.rules.rows import alone
from moekit.compile.schedule.cuts import cut
from moekit.compile.schedule.directives import Axis, Launch, Loop, Rounds, Schedule, Split, Tile, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, equally_deep, once, operands, part_axis
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Node

EACH = 256  # elements of a part
STEPS = {2: 64, 4: 16}  # of them at a time, by the bytes of a value: float32 is multiplied by lanes, which hold all of a block
MOST_ROWS = 64  # of a program, that share their values
MOST_STAGES = 3
FOR_LOADS = 9 * MEASURED.shared_memory // 10  # bytes that loads under way may take
MERGED_COLUMNS = 64  # of a program that puts parts together
ROUNDS = ((0, 256), (4, 64), (16, 16))  # from so many rows on, programs of each that take its parts in turn, of all its heads


@once
def weighed(graph: Graph) -> dict[int, Schedule]:
    """Schedules by the least number of rows, of a graph whose first softmax-weighted sum is over a static axis, of rows that

    share values; none of another graph.
    """
    found = _weighed(graph)
    split = found.launches[0].cut if found else None
    if found is None or not isinstance(split, Split):
        return {0: found} if found else {}
    (section,), axis = found.launches[0].sections, part_axis(split.axis)
    others = (d for d in section.all(Tile) if d.axis != axis and graph.axes[d.axis])
    heads = prod(-(-(graph.axes[d.axis] or 0) // d.block) for d in others)
    by_rows = {}
    for least, programs in ROUNDS:
        taking = section.but(Rounds(axis, max(1, programs // heads)))
        some = Schedule((replace(found.launches[0], sections=(taking,)), *found.launches[1:]))
        by_rows[least] = some if legal(graph, some) is None else found
    return by_rows


def _weighed(graph: Graph) -> Schedule | None:
    """The schedule with a program for each part of a row."""
    for node in graph.live_nodes("exp_sum"):
        if (sides := _sides(graph, node)) and graph.axes[node.attr("axis")]:
            schedule = _schedule(graph, node, *sides)
            return schedule if legal(graph, schedule) is None else None
    return None


def _sides(graph: Graph, node: Node) -> tuple[str, str] | None:
    """The axis of the rows that share values, and that of the values' columns; None where there is not one of each."""
    scores, values = (set(graph.nodes[a].axes) for a in operands(node))
    rows, columns = graph.ordered(scores - values), graph.ordered(values - scores)
    return (rows[0], columns[0]) if len(rows) == len(columns) == 1 else None


def _schedule(graph: Graph, node: Node, rows: str, columns: str) -> Schedule:
    axis, size = node.attr("axis"), itemsize(graph.nodes[node.args[1]].dtype)
    tall = max(MEASURED.matrix, min(MOST_ROWS, pow2(graph.axes[rows] or MOST_ROWS)))
    said: dict[str, Axis] = {axis: Loop(axis, STEPS[size]), rows: Tile(rows, tall)}
    parts = -(-(graph.axes[axis] or 0) // EACH)
    if parts < 2 or not equally_deep(graph, axis):
        return Schedule((_launch(graph, axis, said, columns),))
    split = Split(axis, parts, EACH)
    first, rest, _ = cut(graph, split)
    merged: dict[str, Axis] = {columns: Tile(columns, min(MERGED_COLUMNS, pow2(graph.axes[columns] or MERGED_COLUMNS)))}
    held = (merged.get(a) or (Tile(a, 1) if use.parallel else Loop(a, 1)) for a, use in axis_uses(rest).items())
    return Schedule((_launch(first, axis, said, columns).but(split), alone(held, warps=2, stages=1)))


def _launch(graph: Graph, axis: str, said: dict[str, Axis], columns: str) -> Launch:
    """Programs for each element of what is parallel; what is summed up within a step, and the columns, whole."""
    held: list[Axis] = [
        said.get(a) or (Tile(a, 1) if use.parallel and a != columns else Whole(a, max(MEASURED.matrix, pow2(use.extent or 1))))
        for a, use in axis_uses(graph).items()
    ]
    block = {d.axis: d.block for d in held}
    loaded = [n for n in graph.live_nodes("read") if axis in n.axes]
    turn = sum(prod(block[a] for a in n.axes) * itemsize(n.dtype) for n in loaded)
    return alone(held, warps=4, stages=max(1, min(MOST_STAGES, FOR_LOADS // max(1, turn))))
