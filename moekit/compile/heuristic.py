"""The heuristic: a good schedule for any graph, without tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from moekit.compile.analysis import PART, AxisUse, axis_uses, first_gemm, gemms, has_gemm, scattered
from moekit.compile.fit import ROW_TILE, ROWS_A_LANE, TOGETHER, WHOLE_TILE, shrunk, summed_rows
from moekit.compile.gathers import gathered_product
from moekit.compile.gemm import (
    GEMM_COLUMNS,
    GEMM_TILES,
    Parts,
    Tile,
    gemm_schedule,
    may_go_in_a_row,
    splitting,
    tiles,
)
from moekit.compile.schedule import LARGEST_TILE, MATRIX, Schedule, fitted, largest_tile, launches, pow2
from moekit.compile.sections import meant, sections
from moekit.lang.graph import Graph

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


def heuristic(graph: Graph, tokens: int | None = None) -> Schedule:
    """A good schedule without tuning, for a few rows or for the class of `tokens_class` (one of `row_classes`).

    How anything is added up does not depend on it, so a row's result does not depend on T.
    """
    if found := gathered_product(graph):
        return found
    if tokens and _elementwise(graph):
        return _many_elements(graph)
    if tokens and _short_rows(graph):
        return _twice(graph)
    split, columns = splitting(graph)
    tile = next(x for x in reversed(tiles(graph)) if (tokens or 0) >= x.least)
    split, parts = ((), split) if tile.in_a_row and may_go_in_a_row(graph) else (split, ())
    every = [g for launch in launches(graph, Schedule((), split)) for g in launch]
    pieces = [section_schedule(g, split, tile, parts, columns) for g in every]
    axes: dict[str, tuple[str, str, int]] = {}
    for schedule in pieces:
        for said in schedule.axes:
            axes.setdefault(said[0], said)
    gemms = [s.stages for g, s in zip(every, pieces, strict=True) if first_gemm(g)]
    stages = min(gemms, default=pieces[0].stages)
    if split and len(gemms) > 1 and stages == 6:
        stages = 7  # with 6, ptxas (12.8) spills a register of several sections' loops; 2 % slower at T = 1, 0.5 % at 16
    found = replace(pieces[0], axes=tuple(axes[a] for a in axis_uses(graph)), split=split, parts=parts, stages=stages)
    return _held(meant(launches(graph, Schedule((), split))[0]), found)


def _held(together: Sequence[Graph], schedule: Schedule) -> Schedule:
    """Smaller blocks where one section goes along the columns of several products, more than its programs can hold.

    All blocks stay such as the matrix unit takes.
    """
    largest = max(largest_tile(g, fitted(g, schedule, None)) for g in together)
    while largest > LARGEST_TILE and (free := [(b, a) for a, m, b in schedule.axes if m == "grid" and b > MATRIX]):
        block, axis = max(free)
        schedule = schedule.with_axis(axis, block=block // 2)
        largest = max(largest_tile(g, fitted(g, schedule, None)) for g in together)
    return schedule


def row_classes(graph: Graph) -> tuple[int, ...]:
    """The least numbers of rows, ascending from 0, from which on a graph has another schedule.

    The tiles of a GEMM's classes add up in the same order, lanes hold short rows alike whatever their number, and where nothing
    is added up there is no order: a row has the same bits whatever the rows beside it.
    """
    if class_axis(graph) is None or gathered_product(graph):
        return (0,)
    if gemms(graph):
        return tuple(tile.least for tile in tiles(graph))
    columns = prod(graph.axes[a] or 1 for a in axis_uses(graph))
    if _elementwise(graph):
        return 0, max(2, -(-MANY_ELEMENTS // columns))
    return (0, max(2, -(-MANY_SUMMED // columns))) if _short_rows(graph) else (0,)


def tokens_class(graph: Graph, sizes: Mapping[str, int]) -> int | None:
    """The class of rows that a call belongs to, None where the heuristic does not look at sizes."""
    classes, rows = row_classes(graph), class_axis(graph)
    if rows is None or len(classes) == 1:
        return None
    return max(least for least in classes if sizes[rows] >= least)


def class_axis(graph: Graph) -> str | None:
    """The dynamic axis whose size says which class a call belongs to: a GEMM's rows, or the only one there is."""
    found = [g.m for g in gemms(graph).values()]
    found = found or [a for a, use in axis_uses(graph).items() if use.extent is None and use.parallel]
    return next((a for a in found if graph.axes[a] is None), None)


def _elementwise(graph: Graph) -> bool:
    """Whether nothing brings elements together and every program can have any of them."""
    nodes = [graph.nodes[i] for i in graph.live()]
    return not any(n.op in TOGETHER for n in nodes) and all(use.parallel for use in axis_uses(graph).values())


def _short_rows(graph: Graph) -> bool:
    """Whether programs sum up several rows, each whole, with at least as many rows as a lane holds elements.

    Triton then gives a row all the lanes that it can use, and other rows beside it do not change which, if they lie in
    lanes as they were loaded. A sum of what all rows share would get lanes of the warps that come with more of them.
    """
    schedule, *outer = section_schedule(graph), *list(axis_uses(graph).values())[:-1]
    alone = len(sections(graph)) == 1 and all(u.parallel for u in outer) and schedule.axes[-1][1] == "whole"
    axis, nodes = _growing(graph, schedule), [graph.nodes[i] for i in graph.live()]
    loaded = {n.axes for n in nodes if n.op == "read"}
    summed = {graph.nodes[n.args[0]].axes for n in nodes if n.op == "reduce"}
    grow = axis is not None and summed <= loaded and all(axis in axes for axes in summed)
    return alone and grow and summed_rows(graph, schedule) >= ROWS_A_LANE


def _twice(graph: Graph) -> Schedule:
    """Programs with twice as many rows and warps."""
    schedule = section_schedule(graph)
    axis = _growing(graph, schedule) or ""
    return replace(schedule.with_axis(axis, block=2 * schedule.block(axis)), warps=2 * schedule.warps)


def _growing(graph: Graph, schedule: Schedule) -> str | None:
    """The innermost axis of rows of which a program can have more; rows that are put at ids come one by one."""
    outer = list(axis_uses(graph).values())[:-1]
    room = [u.name for u in outer if u.extent is None or schedule.block(u.name) < u.extent]
    return next((a for a in reversed(room) if a not in scattered(graph)), None)


def section_schedule(
    graph: Graph, split: Parts = (), tile: Tile = GEMM_TILES[0], parts: Parts = (), columns: int = GEMM_COLUMNS[0]
) -> Schedule:
    """A good schedule for a graph whose outputs share programs; an axis that is split is looped over.

    `columns`: the block of a GEMM's columns where few rows are.
    """
    found = first_gemm(graph)
    uses = axis_uses(graph)
    schedule = gemm_schedule(graph, uses, found, split or parts, tile, columns) if found else _row_schedule(graph, uses)
    for axis, several in split if any(a.endswith(PART) for a in uses) else ():
        if any(a == axis and m == "whole" for a, m, _ in schedule.axes):
            schedule = schedule.with_axis(axis, "loop", pow2(-(-(graph.axes[axis] or 1) // several)))
        schedule = replace(schedule, split=split)
    return schedule


def joined_warps(pairs: Sequence[tuple[Graph, Schedule]]) -> int:
    """Warps of a launch of several sections: the most that one wants, but a top_k (a chain of reductions) has its own.

    How a row is added up depends on them, so beside a GEMM, which has more with more rows, a sum has those of the largest.
    """
    chain = [s.warps for g, s in pairs if any(g.nodes[i].op == "top_k" for i in g.live())]
    gemms = [has_gemm(g) for g, _ in pairs]
    least = max(tile.warps for tile in GEMM_TILES) if any(gemms) and not all(gemms) else 1
    return min(chain) if chain else max(least, *(s.warps for _, s in pairs))


def _row_schedule(graph: Graph, uses: dict[str, AxisUse]) -> Schedule:
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


def _many_elements(graph: Graph) -> Schedule:
    """Element by element, with memory's bandwidth as the limit: 8 elements a lane, in blocks as wide as rows allow."""
    chosen, tile = {}, 1
    for use in reversed(axis_uses(graph).values()):
        block = 1 if use.name in scattered(graph) else min(pow2(use.extent or ROW_TILE), ROW_TILE // tile)
        chosen[use.name] = block
        tile *= block
    return Schedule(tuple((a, "grid", chosen[a]) for a in axis_uses(graph)), warps=max(1, tile // 256), stages=1)


def _contracts(graph: Graph) -> bool:
    return any(graph.nodes[i].op == "contract" for i in graph.live())
