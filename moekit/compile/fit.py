"""What every good schedule keeps to: blocks that a program can hold, and warps that match them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from moekit.compile.analysis import PART, AxisUse, axis_uses
from moekit.compile.schedule import Schedule, largest_tile, pow2, uses_dot
from moekit.lang.graph import Graph, Node

WHOLE_TILE = 2**14
ROW_TILE = 2**11
TOGETHER = ("reduce", "contract", "cumsum", "top_k")
ROWS_A_LANE = 4  # rows of a program from which on they are short: as many as a lane then holds elements


def summed_rows(graph: Graph, schedule: Schedule) -> int:
    """How many rows a program sums up side by side; 1 where lanes are not only brought together along the innermost axis."""
    *outer, inner = axis_uses(graph)
    along = {(n.op, n.attr("axis")) for n in map(graph.nodes.__getitem__, graph.live()) if n.op in TOGETHER}
    return prod(map(schedule.block, outer)) if along == {("reduce", inner)} else 1


def other_axis(use: AxisUse) -> tuple[str, str, int]:
    """How an axis is held that no product runs along."""
    if use.parallel:
        return use.name, "grid", 1
    if use.name.endswith(PART):
        return use.name, "loop", 1
    if use.extent is not None and (use.whole or pow2(use.extent) <= ROW_TILE):
        return use.name, "whole", pow2(use.extent)
    return use.name, "loop", 64


def shrunk(graph: Graph, schedule: Schedule) -> Schedule:
    """Smaller grid and loop blocks until the largest block is one a program can hold; warps to match it."""
    while (tile := largest_tile(graph, schedule)) > WHOLE_TILE:
        free = [(b, a) for a, m, b in schedule.axes if m != "whole" and b > 1]
        whole = [(b, a) for a, m, b in schedule.axes if m == "whole" and not axis_uses(graph)[a].whole and b > ROW_TILE]
        if free:
            block, axis = max(free)
            schedule = schedule.with_axis(axis, block=block // 2)
        elif whole:
            schedule = schedule.with_axis(max(whole)[1], mode="loop", block=ROW_TILE)
        else:
            break
    return replace(schedule, warps=_warps(graph, schedule, tile))


def _warps(graph: Graph, schedule: Schedule, tile: int) -> int:
    """Warps for the largest block. Measured on an H200: element-wise blocks want 4 elements a lane (0.77 to 0.87 of the time
    with 16), those that add up parts 2 (`SUMMED_COLUMNS`), sums over a row 8 (a norm of 2048 at T = 1, 64, 256: 0.84, 0.88,
    0.83 of the time with 16), over several short rows 4 (a gated norm of 32 heads of 128 at T = 1, 16, 64: 0.91, 0.94, 0.90 of
    the time with 8), contractions that the matrix unit does not take 32 (a step of the delta rule, 4 heads at T = 1, 4, 16, 64,
    1024: 0.94, 0.77, 0.86, 0.89, 0.87 of the time with 16), others 16."""
    live = graph.live()
    if any(graph.nodes[i].op == "contract" and uses_dot(graph, schedule, i) for i in live):
        return schedule.warps
    together = [n for n in map(graph.nodes.__getitem__, live) if _reduces(n)]
    if not together:
        return max(1, min(8, tile // (64 if any(a.endswith(PART) for a in axis_uses(graph)) else 128)))
    if any(n.op == "contract" for n in together):
        return max(1, min(16, tile // 1024))
    if any(n.op != "reduce" for n in together):
        return max(1, min(16, tile // 512))
    return max(1, min(16, tile // (128 if summed_rows(graph, schedule) >= ROWS_A_LANE else 256)))


def _reduces(node: Node) -> bool:
    """Whether a node brings lanes together; adding up parts does not."""
    return node.op in TOGETHER and not node.attr("axis").endswith(PART)
