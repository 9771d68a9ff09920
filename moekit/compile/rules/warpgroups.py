"""Schedules for targets whose programs are warpgroups: rows that a warp or two serve go to a program several at a time, each
warp has some of a product's columns, and turns are as long as registers allow, for nothing else holds what is under way.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from moekit.compile.rules.choose import heuristic
from moekit.compile.rules.gemm import products_alone
from moekit.compile.schedule.cost import programs
from moekit.compile.schedule.cuts import launched, sections_of
from moekit.compile.schedule.directives import Launch, Loop, Prefetch, Schedule, Section, Split, Stage, Tile, Warps, Whole, pow2
from moekit.compile.schedule.facts import GemmAxes, gemms
from moekit.compile.schedule.legal import MOST_PARTS, legal
from moekit.compile.schedule.matrix import COLUMNS, SLICE, STEP, shared
from moekit.compile.schedule.targets import MEASURED, TARGETS
from moekit.lang.graph import Graph

BLOCKS = (16, None), (32, 32), (64, 32), (64, 64)  # rows, columns of products alone: the first of so few programs on an SM
PROGRAMS = 1.5
SHORT = 3  # the same of products of one slice: their operands go to registers, and blocks have no more than 32 columns
PART = 256  # of a product's summed axis, in a part of a split
TURN = 512  # of one in a turn, at the most, of what registers hold
LEAST = 32  # of one in a turn: of fewer a lane loads less than 16 bytes, and which elements are a step is another order
SHARED = 98304  # bytes of shared memory for a turn's operands, of blocks of more rows than the first: two programs of an SM
REGISTERS = 208  # of a lane for a turn's operands, two elements each, for sums, and as many as these for what is read beside
LANES = MEASURED.lanes


def warpgroups(graph: Graph, sizes: Mapping[str, int] = MappingProxyType({})) -> Schedule:
    """The rules' schedule for these sizes of dynamic axes, of few rows where nothing is said.

    Where it has fewer warps than a warpgroup, blocks along the innermost axis in tiles are as many times larger; blocks of a
    product's columns have at least some for each warp. Both are so whatever the number of rows: how such a block lies in
    threads follows from its size, and sums with it.

    Where a product is split, its parts are of one size. Of more rows blocks are larger, and turns shorter where registers say
    so: the matrix unit adds up step by step, so the order of sums follows from the parts alone.
    """
    few = heuristic(graph)
    base = _warpgroups(graph, few, {})
    if legal(graph, base):
        return few
    tall = _warpgroups(graph, few, sizes) if sizes else base
    return base if legal(graph, tall) else tall


def _warpgroups(graph: Graph, few: Schedule, sizes: Mapping[str, int]) -> Schedule:
    warps, launches = TARGETS["mosaic"].warps[0], []
    parted = replace(few, launches=tuple(_parted(own, launch) for launch, own, _ in launched(graph, few)))
    for launch, own, _ in launched(graph, parted):
        wide = replace(launch, sections=tuple(_columns(own, section, COLUMNS * warps) for section in launch.sections))
        tall = _tall(own, wide, sizes) if sizes and products_alone(own) else wide
        turned = replace(tall, sections=tuple(_longer(g, section, launch.cut, warps) for g, section in sections_of(own, tall)))
        launches.append(_folded(_ranked(own, turned), warps))
    return replace(few, launches=tuple(launches))


def _parted(graph: Graph, launch: Launch) -> Launch:
    """A launch in so many parts that each is a turn, if it is a product's that is split."""
    cut, sizes = launch.cut, {g.k: graph.axes[g.k] for g in gemms(graph).values()}
    if not isinstance(cut, Split) or cut.each or not (size := sizes.get(cut.axis)):
        return launch
    return launch.but(replace(cut, count=min(MOST_PARTS, max(cut.count, -(-size // PART)))))


def _columns(graph: Graph, section: Section, least: int) -> Section:
    """A section whose blocks of a product's columns, if it makes one, have at least so many."""
    summed = {d.axis for d in (*section.all(Loop), *section.all(Whole))}
    columns = {_block(graph, g)[1] for g in gemms(graph).values() if g.k in summed}
    wide = [Tile(d.axis, max(d.block, least)) if isinstance(d, Tile) and d.axis in columns else d for d in section.directives]
    return replace(section, directives=tuple(wide))


def _block(graph: Graph, gemm: GemmAxes) -> list[str]:
    """The rows and the columns of a product's block in a program, which has its axes in the graph's order."""
    return sorted((gemm.m, gemm.n), key=list(graph.axes).index)


def _tall(graph: Graph, launch: Launch, sizes: Mapping[str, int]) -> Launch:
    """A launch of products alone in the smallest blocks of which an SM has few enough, or in the largest that rows fill."""
    found = [_block(graph, g) for g in gemms(graph).values()]
    axes, columns = ({block[i] for block in found if graph.axes[block[0]] is None} for i in (0, 1))
    most = pow2(max((sizes.get(a, 1) for a in axes), default=1))
    short = all((graph.axes[g.k] or 0) <= SLICE for g in gemms(graph).values())

    def blocks(rows: int, wide: int | None) -> Launch:
        def tile(d: Tile) -> Tile:
            return Tile(d.axis, rows if d.axis in axes else wide if wide and d.axis in columns else d.block)

        return replace(launch, sections=tuple(s.but(*map(tile, s.all(Tile))) for s in launch.sections))

    few, *more = BLOCKS[:-1] if short else BLOCKS
    every = [blocks(*few), *(blocks(*block) for block in more if block[0] <= most)]
    limit = (SHORT if short else PROGRAMS) * MEASURED.sms
    return next((made for made in every if programs(graph, made, sizes) <= limit), every[-1])


def _longer(graph: Graph, section: Section, cut: Split | Stage | None, warps: int) -> Section:
    """A section whose turns along summed axes of products are few; nothing has a place for what would be asked for ahead."""
    count = {cut.axis: cut.count} if isinstance(cut, Split) and not cut.each else {}
    sizes = {g.k: -(-(graph.axes[g.k] or 0) // count.get(g.k, 1)) for g in gemms(graph).values()}
    loops = [d for d in section.all(Loop) if sizes.get(d.axis) and not section.parts]
    turns = {d.axis: min(TURN, _held(graph, section, d.axis, warps), pow2(sizes[d.axis])) for d in loops}
    return section.without(Prefetch).but(*(replace(d, block=max(16, turns[d.axis])) for d in loops))


def _held(graph: Graph, section: Section, axis: str, warps: int) -> int:
    """Elements of a summed axis, a power of two, of which a lane, or of one product of more rows shared memory, holds what a
    section's products take; products of one section share their rows."""
    tiled = {d.axis for d in section.all(Tile)}
    each = sums = most = 0
    found = [g for g in gemms(graph).values() if g.k == axis]
    for gemm in found:
        rows, columns = (section.block(a) if a in tiled else 1 for a in _block(graph, gemm))
        high, wide = shared(rows, columns, warps)
        if rows > STEP and len(found) == 1:
            return 1 << (SHARED // (2 * (rows + columns))).bit_length() - 1
        most = max(most, rows // high)
        each, sums = each + columns // wide, sums + 2 * rows * columns // (LANES * warps)
    room = 2 * LANES * max(1, REGISTERS - sums) // max(1, each + most)
    return 1 << max(LEAST, room).bit_length() - 1


def _ranked(graph: Graph, launch: Launch) -> Launch:
    """A launch whose ranks of a top_k are as many as a warp's lanes, if fewer would be in each lane's registers."""
    ranks = {n.attr("into") for n in graph.live_nodes("top_k")}

    def wide(d: Whole) -> Whole:
        return Whole(d.axis, max(d.block, LANES)) if d.axis in ranks else d

    return replace(launch, sections=tuple(s.but(*map(wide, s.all(Whole))) for s in launch.sections))


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
