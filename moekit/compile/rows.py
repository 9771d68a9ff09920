"""The heuristic for what the matrix unit has no part in: rows, and what is computed element by element."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from moekit.compile.analysis import PART, AxisUse, axis_uses, scattered
from moekit.compile.schedule import Schedule, largest_tile, pow2, uses_dot
from moekit.compile.sections import sections
from moekit.lang.graph import Graph, Node

WHOLE_TILE = 2**14
ROW_TILE = 2**11
# Elements of an output that is computed element by element, from which on tiles are larger: twice as many elements a lane are
# 16 bytes at a time, and programs are half as many. Measured on an H200 (bfloat16), µs with larger tiles and without: a gated
# activation of 1024 columns at T = 512, 1024, 4096, 65536: 2.20 and 1.92, 2.87 and 2.91, 7.44 and 7.77, 94.6 and 100.2; of 64
# at T = 8192, 16384, 65536: 2.42 and 2.35, 3.04 and 3.73, 8.19 and 11.0; a gated sum of 2048 columns at T = 256, 512, 65536:
# 1.87 and 1.89, 2.73 and 2.79, 185.0 and 192.6, where a plain sum of two tensors needs 183.6. Tiles of twice that gain 0.5 %.
MANY_ELEMENTS = 2**20
# Elements of short rows that are summed up, several to a program, from which on a program has twice as many rows and warps: the
# same lanes hold a row. Measured on an H200 (bfloat16) with a gated norm of 4 and of 32 heads of 128, the time with larger
# programs over that with smaller ones: 4 heads at T = 256, 512, 1024, 4096, 16384: 1.02, 1.00, 0.91, 0.90, 0.74; 32 heads at
# T = 16, 64, 256, 1024, 16384: 1.05, 1.01, 0.79, 0.79, 0.72. Four times as many gain no more.
MANY_SUMMED = 2**19
# Where parts are added up, a program has so many columns of one row, two elements a lane: its loads are all under way at once,
# and there are programs enough. Measured on an H200, a gate GEMM and its epilogue (bfloat16, 4 parts) at T = 1, 16, 64, µs:
# 2048 → 641 3.2, 3.4 and 3.8; with 2 rows of 256 columns or 8 of 64, four elements a lane, 3.6, 3.9 and 4.3. 2048 → 1537 4.0,
# 4.2 and 4.8, else 4.4, 4.6 and 5.3; with one row, and four elements a lane 4.2, 4.4 and 5.0.
SUMMED_COLUMNS = 256
TOGETHER = ("reduce", "contract", "cumsum", "top_k")
ROWS_A_LANE = 4  # rows of a program from which on they are short: as many as a lane then holds elements


def many_rows(graph: Graph) -> int | None:
    """From how many rows on a graph has the schedule of `for_many_rows`; None where it has none."""
    least = MANY_ELEMENTS if _elementwise(graph) else MANY_SUMMED if _short_rows(graph) else 0
    return max(2, -(-least // prod(graph.axes[a] or 1 for a in axis_uses(graph)))) if least else None


def for_many_rows(graph: Graph) -> Schedule:
    """A good schedule for `many_rows` and more."""
    return _many_elements(graph) if _elementwise(graph) else _twice(graph)


def _elementwise(graph: Graph) -> bool:
    """Whether nothing brings elements together and every program can have any of them."""
    nodes = [graph.nodes[i] for i in graph.live()]
    return not any(n.op in TOGETHER for n in nodes) and all(use.parallel for use in axis_uses(graph).values())


def _short_rows(graph: Graph) -> bool:
    """Whether programs sum up several rows, each whole, with at least as many rows as a lane holds elements.

    Triton then gives a row all the lanes that it can use, and other rows beside it do not change which.
    """
    uses = axis_uses(graph)
    if len(sections(graph)) > 1 or not all(u.parallel for u in list(uses.values())[:-1]) or _contracts(graph):
        return False
    schedule = row_schedule(graph, uses)
    whole = schedule.axes[-1][1] == "whole"
    return whole and _rows(graph, schedule) >= ROWS_A_LANE and _growing(graph, schedule) is not None


def row_schedule(graph: Graph, uses: dict[str, AxisUse]) -> Schedule:
    """Rows: reduced axes whole while they fit, then the innermost parallel axis, then several rows a program."""
    chosen: dict[str, tuple[str, int]] = {}
    tile = 1
    inner = [u for u in uses.values() if not u.parallel and not u.name.endswith(PART)]
    chosen |= {u.name: ("loop", 1) for u in uses.values() if not u.parallel and u.name.endswith(PART)}
    for use in sorted(inner, key=lambda u: (not u.whole, u.extent is None, u.extent or 0)):
        if use.extent is not None and (use.whole or tile * pow2(use.extent) <= WHOLE_TILE):
            chosen[use.name] = ("whole", pow2(use.extent))
        else:
            chosen[use.name] = ("loop", max(1, min(pow2(use.extent or 64), ROW_TILE // min(tile, ROW_TILE))))
        tile *= chosen[use.name][1]
    sums_parts = any(u.name.endswith(PART) for u in uses.values())
    budget = ROW_TILE // 2 if not inner else 2 * ROW_TILE if _contracts(graph) else ROW_TILE // 4
    columns = [u for u in uses.values() if u.parallel]
    for use in reversed(columns):
        extent = use.extent if use.extent is not None else 8
        single = use.name in scattered(graph) or use.name.endswith(PART) or (sums_parts and not inner and tile > 1)
        block = 1 if single else max(1, min(pow2(extent), budget // tile, SUMMED_COLUMNS if sums_parts else 1024))
        chosen[use.name] = ("grid", block)
        tile *= block
    loops = any(chosen[u.name][0] == "loop" for u in inner)
    schedule = Schedule(tuple((a, *chosen[a]) for a in uses), stages=2 if loops else 1)
    return shrunk(graph, schedule)


def _twice(graph: Graph) -> Schedule:
    """Programs with twice as many rows and warps."""
    schedule = row_schedule(graph, axis_uses(graph))
    axis = _growing(graph, schedule) or ""
    return replace(schedule.with_axis(axis, block=2 * schedule.block(axis)), warps=2 * schedule.warps)


def _growing(graph: Graph, schedule: Schedule) -> str | None:
    """The innermost axis of rows of which a program can have more; rows that are put at ids come one by one."""
    outer = list(axis_uses(graph).values())[:-1]
    room = [u.name for u in outer if u.extent is None or schedule.block(u.name) < u.extent]
    return next((a for a in reversed(room) if a not in scattered(graph)), None)


def _many_elements(graph: Graph) -> Schedule:
    """Element by element, with memory's bandwidth as the limit: 8 elements a lane, in blocks as wide as rows allow."""
    chosen, tile = {}, 1
    for use in reversed(axis_uses(graph).values()):
        block = 1 if use.name in scattered(graph) else min(pow2(use.extent or ROW_TILE), ROW_TILE // tile)
        chosen[use.name] = block
        tile *= block
    return Schedule(tuple((a, "grid", chosen[a]) for a in axis_uses(graph)), warps=max(1, tile // 256), stages=1)


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
    return max(1, min(16, tile // (128 if _rows(graph, schedule) >= ROWS_A_LANE else 256)))


def _rows(graph: Graph, schedule: Schedule) -> int:
    """How many rows a program sums up side by side; 1 where lanes are not only brought together along the innermost axis."""
    *outer, inner = axis_uses(graph)
    along = {(n.op, n.attr("axis")) for n in map(graph.nodes.__getitem__, graph.live()) if n.op in TOGETHER}
    return prod(map(schedule.block, outer)) if along == {("reduce", inner)} else 1


def _contracts(graph: Graph) -> bool:
    return any(graph.nodes[i].op == "contract" for i in graph.live())


def _reduces(node: Node) -> bool:
    """Whether a node brings lanes together; adding up parts does not."""
    return node.op in TOGETHER and not node.attr("axis").endswith(PART)
