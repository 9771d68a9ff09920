"""Schedules for targets whose programs are warpgroups: rows that a warp or two serve go to a program several at a time, each
warp has some of a product's columns, and turns are as long as registers allow, for nothing else holds what is under way.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.rules.choose import heuristic
from moekit.compile.schedule.directives import Launch, Loop, Schedule, Section, Split, Tile, Warps, Whole, pow2
from moekit.compile.schedule.facts import GemmAxes, gemms
from moekit.compile.schedule.legal import MOST_PARTS, legal
from moekit.compile.schedule.targets import TARGETS
from moekit.lang.graph import Graph

COLUMNS = 8  # that a warp's product has at the least
PART = 256  # of a product's summed axis, in a part of a split: one turn
TURN = 512  # of one that is not split, in a turn
HELD = 16384  # elements of a product's columns in a turn


def warpgroups(graph: Graph) -> Schedule:
    """The rules' schedule for few rows, whatever the number of rows: how a block lies in threads follows from its size, and
    sums with it. Where it has fewer warps than a warpgroup, blocks along the innermost axis in tiles are as many times larger;
    blocks of a product's columns have at least some for each warp. Where a product is split, its parts are one turn each.
    """
    few, (warps,) = heuristic(graph), TARGETS["mosaic"].warps
    launches = (_turned(graph, _shared(graph, launch, warps)) for launch in few.launches)
    folded = replace(few, launches=tuple(_folded(launch, warps) for launch in launches))
    return few if legal(graph, folded) else folded


def _shared(graph: Graph, launch: Launch, warps: int) -> Launch:
    return replace(launch, sections=tuple(_columns(graph, section, COLUMNS * warps) for section in launch.sections))


def _columns(graph: Graph, section: Section, least: int) -> Section:
    """A section whose blocks of a product's columns, if it makes one, have at least so many."""
    summed = {d.axis for d in (*section.all(Loop), *section.all(Whole))}
    columns = {_column(graph, g) for g in gemms(graph).values() if g.k in summed}
    wide = [Tile(d.axis, max(d.block, least)) if isinstance(d, Tile) and d.axis in columns else d for d in section.directives]
    return replace(section, directives=tuple(wide))


def _column(graph: Graph, gemm: GemmAxes) -> str:
    """The columns of a product's block in a program, which has its axes in the graph's order."""
    return max(gemm.m, gemm.n, key=list(graph.axes).index)


def _turned(graph: Graph, launch: Launch) -> Launch:
    """A launch whose products take as much of the summed axis in a turn as registers hold, in more parts where it is split."""
    sizes, cut = {g.k: graph.axes[g.k] for g in gemms(graph).values()}, launch.cut
    if isinstance(cut, Split) and not cut.each and (size := sizes.get(cut.axis)):
        cut = replace(cut, count=min(MOST_PARTS, max(cut.count, -(-size // PART))))
        sizes[cut.axis] = -(-size // cut.count)
        launch = launch.but(cut)
    return replace(launch, sections=tuple(_longer(graph, section, sizes) for section in launch.sections))


def _longer(graph: Graph, section: Section, sizes: dict[str, int | None]) -> Section:
    """A section whose turns along summed axes of products, `sizes` for each program, are few."""
    tiled = {d.axis for d in section.all(Tile)}
    columns = {_column(graph, g) for g in gemms(graph).values()}
    columns = max((section.block(a) for a in columns if a in tiled), default=1)
    turns = {axis: min(TURN, HELD // columns, pow2(size)) for axis, size in sizes.items() if size}
    longer = [replace(d, block=max(16, turns[d.axis])) for d in section.all(Loop) if d.axis in turns and not section.parts]
    return section.but(*longer)


def _folded(launch: Launch, warps: int) -> Launch:
    if launch.warps >= warps or len(launch.sections) != 1:
        return launch
    (section,) = launch.sections
    tiles = section.all(Tile)
    if not tiles:
        return launch
    last = tiles[-1]
    larger = Tile(last.axis, last.block * warps // launch.warps)
    section = replace(section, directives=tuple(larger if d == last else d for d in section.directives))
    own = tuple(Warps(warps) if isinstance(d, Warps) else d for d in launch.directives)
    return replace(launch, sections=(section,), directives=own)
