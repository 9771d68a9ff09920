"""Good schedules for programs that go row by row, and what every good schedule keeps to: blocks a program can hold, and warps.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from moekit.compile.schedule.directives import (
    Axis,
    Dependent,
    Launch,
    Loop,
    Section,
    Stages,
    Tile,
    Warps,
    Whole,
    pow2,
)
from moekit.compile.schedule.facts import PART, PRODUCTS, AxisUse, axis_uses, ragged, scattered
from moekit.compile.schedule.legal import largest_tile, uses_dot
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.graph import Graph

MOST_PROGRAMS = 2**31 - 1
WHOLE_TILE = 2**14
ROW_TILE = 2**11
TOGETHER = ("reduce", "contract", "exp_sum", "cumsum", "top_k")
ROWS_A_LANE = 4  # rows of a program from which on they are short: as many as a lane then holds elements
MANY_ELEMENTS = 2**20  # of an output that is computed element by element, from which on tiles are larger
MANY_SUMMED = 2**19  # elements of short rows that are summed up, from which on a program has twice the rows and warps
SUMMED_COLUMNS = 256  # of one row in a program that adds up parts
# Elements of the largest block for each warp, by what is done with it
ELEMENTWISE, OF_PARTS, OF_PRODUCTS, OF_CHAINS, OF_SHORT_ROWS, OF_ROWS = 128, 64, 1024, 512, 128, 256
OF_PACKETS = 128  # four a lane: of 16 bits what one access of a mailbox has, so that lanes side by side write side by side
BY_PACKETS = 128  # rows up to which ranks add up by packets, where they could by a library


def alone(axes: Iterable[Axis], warps: int = 4, stages: int = 2) -> Launch:
    """A launch of one section."""
    return Launch((Section((), tuple(axes)),), (Warps(warps), Stages(stages), Dependent()))


def row_launch(graph: Graph) -> Launch:
    """Rows: reduced axes whole while they fit, then the innermost parallel axis, then several rows a program."""
    uses, chosen, tile = axis_uses(graph), {}, 1
    one_by_one = {u.name for u in uses.values() if not u.parallel and (u.in_turns or u.name.endswith(PART))}
    inner = [u for u in uses.values() if not u.parallel and u.name not in one_by_one]
    chosen |= {a: Loop(a, 1) for a in one_by_one}
    for use in sorted(inner, key=lambda u: (not u.whole, u.extent is None, u.extent or 0)):
        if use.extent is not None and (use.whole or tile * pow2(use.extent) <= WHOLE_TILE):
            chosen[use.name] = Whole(use.name, pow2(use.extent))
        else:
            chosen[use.name] = Loop(use.name, max(1, min(pow2(use.extent or 64), ROW_TILE // min(tile, ROW_TILE))))
        tile *= chosen[use.name].block
    sums_parts = any(u.name.endswith(PART) for u in uses.values())
    budget = ROW_TILE // 2 if not inner else 2 * ROW_TILE if any(graph.live_nodes("contract")) else ROW_TILE // 4
    for use in reversed([u for u in uses.values() if u.parallel]):
        extent = use.extent if use.extent is not None else 8
        single = (
            use.name in scattered(graph) | ragged(graph) or use.name.endswith(PART) or (sums_parts and not inner and tile > 1)
        )
        block = 1 if single else max(1, min(pow2(extent), budget // tile, SUMMED_COLUMNS if sums_parts else 1024))
        chosen[use.name] = Tile(use.name, block)
        tile *= block
    loops = any(isinstance(chosen[u.name], Loop) for u in inner)
    return shrunk(graph, alone((chosen[a] for a in uses), stages=2 if loops else 1))


def many_rows(graph: Graph) -> tuple[int, Launch] | None:
    """A launch for many rows of a graph without products, and from how many elements on; None where few rows' serves all.

    Either nothing brings elements together, or programs sum up several short rows, each by the same lanes in both launches.
    """
    if _elementwise(graph):
        return MANY_ELEMENTS, _many_elements(graph)
    return (MANY_SUMMED, _twice(graph)) if _short_rows(graph) else None


def _elementwise(graph: Graph) -> bool:
    """Whether nothing brings elements together and every program can have any of them."""
    return not any(graph.live_nodes(*TOGETHER)) and all(use.parallel for use in axis_uses(graph).values())


def _many_elements(graph: Graph) -> Launch:
    """Element by element, with memory's bandwidth as the limit: 8 elements a lane, in blocks as wide as rows allow."""
    chosen, tile = {}, 1
    for use in reversed(axis_uses(graph).values()):
        block = 1 if use.name in scattered(graph) else min(pow2(use.extent or ROW_TILE), ROW_TILE // tile)
        chosen[use.name] = Tile(use.name, block)
        tile *= block
    return alone((chosen[a] for a in axis_uses(graph)), warps=max(1, tile // 256), stages=1)


def _twice(graph: Graph) -> Launch:
    """Programs with twice as many rows and warps."""
    launch = row_launch(graph)
    (section,) = launch.sections
    axis = _growing(graph, section) or ""
    return replace(launch, sections=(section.but(Tile(axis, 2 * section.block(axis))),)).but(Warps(2 * launch.warps))


def _short_rows(graph: Graph) -> bool:
    """Whether programs sum up several rows, each whole, with at least as many rows as a lane holds elements.

    Triton then gives a row all the lanes that it can use, and other rows beside it do not change which, if they lie in
    lanes as they were loaded. A sum of what all rows share would get lanes of the warps that come with more of them.
    """
    if any(graph.live_nodes("contract")):
        return False
    (section,), outer = row_launch(graph).sections, list(axis_uses(graph).values())[:-1]
    held = all(u.parallel for u in outer) and isinstance(section.axes[-1], Whole)
    axis = _growing(graph, section)
    loaded = {n.axes for n in graph.live_nodes("read")}
    summed = {graph.nodes[n.args[0]].axes for n in graph.live_nodes("reduce")}
    grow = axis is not None and summed <= loaded and all(axis in axes for axes in summed)
    return held and grow and _summed_rows(graph, section) >= ROWS_A_LANE


def _growing(graph: Graph, section: Section) -> str | None:
    """The innermost axis of rows of which a program can have more; rows that are put at ids come one by one."""
    outer = list(axis_uses(graph).values())[:-1]
    room = [u.name for u in outer if u.extent is None or section.block(u.name) < u.extent]
    return next((a for a in reversed(room) if a not in scattered(graph)), None)


def _summed_rows(graph: Graph, section: Section) -> int:
    """How many rows a program sums up side by side; 1 where lanes are not only brought together along the innermost axis."""
    *outer, inner = axis_uses(graph)
    along = {(n.op, n.attr("axis")) for n in graph.live_nodes(*TOGETHER)}
    return prod(map(section.block, outer)) if along == {("reduce", inner)} else 1


def other_axis(use: AxisUse) -> Axis:
    """How an axis is held that no product runs along."""
    if use.parallel:
        return Tile(use.name, 1)
    if use.in_turns or use.name.endswith(PART):
        return Loop(use.name, 1)
    if use.extent is not None and (use.whole or pow2(use.extent) <= ROW_TILE):
        return Whole(use.name, pow2(use.extent))
    return Loop(use.name, 64)


def shrunk(graph: Graph, launch: Launch) -> Launch:
    """Smaller blocks of tiles and loops until the largest block is one a program can hold; warps to match it."""
    (section,) = launch.sections
    while (tile := largest_tile(graph, section)) > WHOLE_TILE:
        free = [(d.block, d.axis, d) for d in section.axes if not isinstance(d, Whole) and d.block > 1]
        whole = [(d.block, d.axis) for d in section.all(Whole) if not axis_uses(graph)[d.axis].whole and d.block > ROW_TILE]
        if free:
            block, _, largest = max(free, key=lambda x: x[:2])
            section = section.but(replace(largest, block=block // 2))
        elif whole:
            section = section.but(Loop(max(whole)[1], ROW_TILE))
        else:
            break
    return replace(launch, sections=(section,)).but(Warps(_warps(graph, launch.warps, section, tile)))


def _warps(graph: Graph, given: int, section: Section, tile: int) -> int:
    """Warps for the largest block: as few elements a lane as that kind of work wants."""
    if any(graph.nodes[i].op in PRODUCTS and uses_dot(graph, section, i) for i in graph.live()):
        return given
    if graph.ranks:
        return max(1, min(max(MEASURED.warps), tile // OF_PACKETS))
    kinds = {n.op for n in graph.live_nodes(*TOGETHER) if not n.attr("axis").endswith(PART)}  # that bring lanes together
    if not kinds:
        return max(1, min(8, tile // (OF_PARTS if any(a.endswith(PART) for a in axis_uses(graph)) else ELEMENTWISE)))
    if kinds & {*PRODUCTS}:
        each = OF_PRODUCTS
    elif kinds != {"reduce"}:
        each = OF_CHAINS
    else:
        each = OF_SHORT_ROWS if _summed_rows(graph, section) >= ROWS_A_LANE else OF_ROWS
    return max(1, min(16, tile // each))
