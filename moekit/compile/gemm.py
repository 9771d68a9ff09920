"""Good schedules for GEMMs: tiles by the number of rows, parts of the contracted axis, stages."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

from moekit.compile.analysis import AxisUse, GemmAxes, first_gemm, gemms, once, reach, scattered
from moekit.compile.fit import TOGETHER, other_axis, shrunk
from moekit.compile.schedule import Schedule, launches, legal_split, pow2
from moekit.compile.sections import sections
from moekit.compile.split import cut
from moekit.lang.dtypes import is_float, itemsize
from moekit.lang.graph import Graph

Parts = tuple[tuple[str, int], ...]
PROGRAMS = 132  # SMs of an H100 or H200: how many programs a weight is spread over
GEMM_COLUMNS = (32, 64, 128)  # blocks of a GEMM's columns: the first that leaves room for ENOUGH_PARTS
SHARED_MEMORY = 227 * 2**10  # bytes of an SM that programs may have
MOST_PARTS, ENOUGH_PARTS = 8, 4
LEAST_DEPTH = 256  # of the contracted axis, in one part
# How much less of the contracted axis a split's programs must have for the launch that adds up to be worth it. Measured on an
# H200 (a GEMM and a gated sum, bfloat16) at T = 1, 16, 64, 128, µs: 512 → 2048 2.2, 2.3, 3.0 and 3.5, in 2 parts 3.3, 4.2, 3.9
# and 4.8; at T = 1, 16, 64: 1024 → 4096 4.2, 4.5 and 5.8, in 4 parts 5.6, 6.1 and 7.2. As Pallas kernels 512 → 2048 2.9, 3.0
# and 3.2 (blocks of 128 of the contracted axis), in 2 parts 4.1, 4.5 and 4.4.
WORTH_A_LAUNCH = 1024


class Tile(NamedTuple):
    """A block of a GEMM for calls of `least` rows and more. `in_a_row`: a program does all parts of the contracted axis."""

    least: int
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    in_a_row: bool = False


# Measured on an H200 with a gate GEMM and its epilogue (2048 → 641, bfloat16, 4 parts), µs: T = 16 with the first 3.4; T = 64
# with the second 3.8, with the first 8.0. The last has no spills with 8 warps, and has with 4. Norm, gate GEMM and epilogue in
# one fusion, at T = 256 and 1024 with the last 15.2 and 52.6, with the one before 16.4 and 59.7; 2048 → 1537: 20.1 and 73.3,
# else 22.8 and 84.8.
GEMM_TILES = (
    Tile(0, 16, 32, 256, 4, 4),
    Tile(17, 64, 32, 128, 4, 4),
    Tile(65, 128, 32, 64, 8, 4),
    Tile(128, 64, 128, 64, 4, 4),
    Tile(256, 128, 128, 64, 8, 4, in_a_row=True),
)
WIDE_ROWS = 2048  # of float32, from which on a split is not worth its scratch
LEAST_BLOCK = 64  # of the contracted axis, where a block of few rows has more columns than 32
# Tiles of a GEMM that is no deeper than that: one step, so nothing but its operands and outputs is to be moved, and small tiles
# have more of it under way. Measured on an H200 (64 → 2048 and a gated sum, bfloat16), µs, with tiles as of deeper ones in
# parentheses: T = 64, 91, 362, 512: 1.73, 1.86, 2.83, 3.07 (2.08, 2.27, 3.11, 3.43); T = 16384: 44.3 (48.7).
SHALLOW_TILES = (
    Tile(0, 16, 32, LEAST_BLOCK, 4, 4),
    Tile(17, 32, 32, LEAST_BLOCK, 4, 4),
    Tile(65, 64, 64, LEAST_BLOCK, 8, 4),
    Tile(129, 64, 64, LEAST_BLOCK, 4, 4),
)
# Tiles of a GEMM with more rows, each as long as it has no more programs than there are SMs, then the next: a second round of
# programs costs more than a larger tile does. The first two are of a split, the others' programs do all parts: nothing goes
# through memory and no launch adds up, but a program then reads four times as much, and what it takes is just that, at 64 bytes
# a cycle (its first 64 of depth 1.8 µs, 512 3.3, 2048 6.5). Measured on an H200 as above, µs, 2048 → 641: T = 128 with the
# first 4.5, with the third 7.2; T = 256 with the second 5.9, with the first 7.8; T = 384 with the second 7.0, with the third
# 7.4; T = 512 with the third 7.5, with the second 11.4; T = 1024 with the fourth 10.0, with the third 10.6; T = 4096 with the
# last 27, with the fourth 29. 2048 → 1537: T = 128 with the second 6.3, with the third 7.5; T = 256 with the third 7.7, with
# the second 11.2, with 128 x 128 of a split 8.9; T = 512 with the fourth 10.2; T = 1024 with the last 14.5.
# All take more than half of an SM's shared memory (`_filling`): launches wait for each other on the SMs, and two programs of
# one that come to share an SM take twice as long. With 6 stages in place of 8 the third is as fast by itself, but norm, GEMM
# and top_k in a row then take 13.6 and 14.2 µs at T = 256 in place of 11.0 and 11.3 (641 and 1537 columns).
SPLIT_TILES = (Tile(0, 64, 64, 64, 4, 8), Tile(0, 128, 64, 64, 8, 5))
MANY_ROWS = 128
MANY_ROWS_TILES = (
    Tile(0, 64, 64, 64, 4, 8, in_a_row=True),
    Tile(0, 64, 128, 64, 4, 6, in_a_row=True),
    Tile(0, 128, 128, 64, 8, 4, in_a_row=True),
)


@once
def tiles(graph: Graph) -> tuple[Tile, ...]:
    """The tiles of a graph's GEMM: `GEMM_TILES`, or for more rows larger ones, each as soon as smaller ones are too many;

    `SHALLOW_TILES` of a shallow one.
    """
    gemm = next((g for g in gemms(graph).values() if graph.axes[g.m] is None), None)
    if gemm is None or _ordered_by_tile(graph):
        return GEMM_TILES[:1]
    if not gemm_alone(graph):
        return GEMM_TILES
    if _wide(graph, gemm):  # all have the same tile, and parts in place of a split where those are many
        return (*GEMM_TILES[:-1], GEMM_TILES[-1]._replace(least=WIDE_ROWS))
    if (graph.axes[gemm.k] or LEAST_BLOCK + 1) <= LEAST_BLOCK:
        return SHALLOW_TILES
    parts = prod(n for _, n in splitting(graph)[0])
    if parts > 1 and not may_go_in_a_row(graph):
        return GEMM_TILES
    found, few, least = list(GEMM_TILES[:2]), GEMM_TILES[2], GEMM_TILES[2].least
    for tile in (*(SPLIT_TILES if parts > 1 else ()), *MANY_ROWS_TILES):
        if parts > 1 and tile.in_a_row and least == few.least:  # no larger tile of a split would do
            found.append(few)
            least = MANY_ROWS
        across = -(-_gemm_outputs(graph, gemm) // tile.columns) * (1 if tile.in_a_row else parts)
        most = tile.rows * (PROGRAMS // across)
        if most >= least or tile == MANY_ROWS_TILES[-1]:
            found.append(tile._replace(least=least))
            least = most + 1
    return tuple(found)


def _ordered_by_tile(graph: Graph) -> bool:
    """Whether a GEMM's tile says more than how its products are cut: in which order another sum of its programs adds up, or
    what becomes of a second product along another axis, or of rows that are put at ids. A split's first launch brings together
    what is apart without one."""
    found = gemms(graph).values()
    if len({g.k for g in found}) > 1 or any({g.m, g.n} & scattered(graph) for g in found):
        return True
    split, _ = splitting(graph)
    every = [*sections(graph), *(g for launch in launches(graph, Schedule((), split)) for g in launch if split)]
    return any(gemms(g).get(i) != gemm for g in every if (gemm := first_gemm(g)) for i in g.live() if _adds(g, i))


def gemm_alone(graph: Graph) -> bool:
    """Whether a launch of all of a graph has a GEMM that does not wait for anything of a whole row."""
    return any(first_gemm(g) for g in sections(graph))


def may_go_in_a_row(graph: Graph) -> bool:
    """Whether programs may do all parts of a split one after the other: its sections are then in one launch, which changes the

    warps and the steps by which anything else is added up, so nothing else may be; and no output may run along the axis.
    """
    adding = [gemms(graph).get(i) for i in graph.live() if _adds(graph, i)]
    gemm = next(iter(adding), None)
    if gemm is None or any(g is None or (g.m, g.k) != (gemm.m, gemm.k) for g in adding):
        return False
    added = [g for g in sections(graph) if any(_adds(g, i) for i in g.live())]
    return all(first_gemm(g) for g in added) and not any(gemm.k in reach(graph, w) for w in graph.writes)


def _adds(graph: Graph, node: int) -> bool:
    """Whether a node brings floats together."""
    return graph.nodes[node].op in TOGETHER and is_float(graph.nodes[node].dtype)


def _wide(graph: Graph, gemm: GemmAxes) -> bool:
    """Whether a GEMM's operands are float32, which the matrix unit does not take."""
    return _itemsize(graph, gemm) == 4


def _itemsize(graph: Graph, gemm: GemmAxes) -> int:
    """Bytes of an element of a GEMM's operands."""
    found = [graph.nodes[i] for i, g in gemms(graph).items() if g == gemm]
    return max(itemsize(graph.nodes[a].dtype) for n in found for a in n.args)


@once
def splitting(graph: Graph) -> tuple[Parts, int]:
    """The contracted axis to split and in how many parts, so that a small GEMM's weight is read by all SMs; and its columns.

    A program reads its rows of x for all its columns at once, so wider blocks read less where four parts have room beside them.

    A GEMM whose outputs go on to what needs whole rows (a norm's scale, a routing) is split in any case: the first launch makes
    products, the second has programs of other kinds.
    """
    alone = gemm_alone(graph)
    for gemm in gemms(graph).values():
        if {gemm.m, gemm.n} & scattered(graph) or not legal_split(graph, gemm.k):
            continue
        if graph.axes[gemm.k] is None or not any(first_gemm(g) for g in sections(cut(graph, gemm.k, 2)[0])):
            continue
        outputs, depth = _gemm_outputs(graph, gemm), graph.axes[gemm.k] or 0
        most = {columns: _parts(-(-outputs // columns), depth) for columns in GEMM_COLUMNS}
        columns = max(GEMM_COLUMNS, key=lambda c: (min(most[c], ENOUGH_PARTS), -c))
        parts = most[columns] if alone else max(2, most[columns])
        return (((gemm.k, parts),) if parts > 1 else ()), columns
    return (), GEMM_COLUMNS[0]


def _parts(blocks: int, depth: int) -> int:
    """How many parts leave each SM one program at the most; 1 where they are not worth a launch."""
    parts = 1
    while parts < MOST_PARTS and 2 * parts * blocks <= PROGRAMS and depth >= 2 * parts * LEAST_DEPTH:
        parts *= 2
    return parts if depth - depth // parts >= WORTH_A_LAUNCH else 1


def _gemm_outputs(graph: Graph, gemm: GemmAxes) -> int:
    """Columns that all contractions over the same axis and rows write."""
    found = [g for g in gemms(graph).values() if (g.k, g.m) == (gemm.k, gemm.m)]
    return sum(graph.axes[g.n] or 0 for g in found)


def gemm_schedule(graph: Graph, uses: dict[str, AxisUse], gemm: GemmAxes, parts: Parts, tile: Tile, few: int) -> Schedule:
    wide, depth, several = _wide(graph, gemm), uses[gemm.k].extent or 64, dict(parts).get(gemm.k, 1)
    _, rows, columns, k_block, warps, stages, _ = tile
    fills = several > 1 and columns == GEMM_COLUMNS[0] and not wide
    if wide:
        rows, columns, k_block, warps, stages = 16, GEMM_COLUMNS[0], 32, 4, 3
    elif columns == GEMM_COLUMNS[0]:
        columns, k_block = few, max(LEAST_BLOCK, k_block * columns // few)  # as much of the weight at a time
    if not wide and several > 1 and depth % (several * GEMM_TILES[0].depth):  # else the tile would say where a part begins
        k_block, stages = 128, max(2, min(stages, stages * k_block // 128))
    accumulators = sum(g == gemm for g in gemms(graph).values())
    columns = max(16, min(columns // accumulators, pow2(uses[gemm.n].extent or columns)))
    wanted = ((gemm.m, rows), (gemm.n, columns), (gemm.k, max(16, min(pow2(depth), k_block))))
    blocks = {a: 1 if a in scattered(graph) else b for a, b in wanted}
    axes = []
    for a, use in uses.items():
        if a in (gemm.m, gemm.n):
            axes.append((a, "grid", blocks[a]))
        elif a == gemm.k and not use.whole:
            axes.append((a, "loop", blocks[a]))
        else:
            axes.append(other_axis(use))
    schedule = Schedule(tuple(axes), warps=warps, stages=stages)
    return shrunk(graph, replace(schedule, stages=_filling(graph, schedule, gemm)) if fills else schedule)


def deeper(section: Graph, schedule: Schedule) -> Schedule:
    """`schedule` for one section of a launch, twice as deep where its programs do all parts of few columns.

    Such a program loads little beside its rows, and waits for them all the same: it needs as much under way as the others have.
    Measured on an H200 with the one column of a shared gate (bfloat16), us: 2048 -> 1537 at T = 1024, 2048, 4096, 16384: 14.4,
    27.5, 51.1, 188 in place of 15.0, 28.8, 55.3, 198; 2048 -> 641 at T = 4096, 16384: 27.6, 84.6 in place of 27.6, 85.8.
    Programs of half as many rows take 50.2 and 191, 27.5 and 89.3.
    """
    gemm = first_gemm(section)
    if gemm is None or not schedule.parts or _ordered_by_tile(section):
        return schedule
    rows, columns, depth = (schedule.block(a) for a in (gemm.m, gemm.n, gemm.k))
    length = -(-(section.axes[gemm.k] or 0) // schedule.parts[0][1])
    held = 2 * depth * (rows + columns) * _itemsize(section, gemm) * schedule.stages
    if 4 * columns > rows or length % (2 * depth) or held > SHARED_MEMORY:
        return schedule
    return schedule.with_axis(gemm.k, block=2 * depth)


def _filling(graph: Graph, schedule: Schedule, gemm: GemmAxes) -> int:
    """So many stages that a program's blocks take more than half of an SM's shared memory.

    The next launch's programs come while this one's still run, and where two fit on an SM, the SMs that stand empty get two
    each, which then share what one could have. Measured on an H200, us with these stages, and least and most of others:
    2048 to 648 at T = 1, 16, 64: 3.01 of 3.17 to 3.87, 3.22 of 3.35 to 3.96, 3.75 of 3.78 to 4.3; 2048 to 1544 at T = 1, 16:
    3.99 of 4.29 to 5.03, 4.23 of 4.30 to 5.25. The times of one graph then also vary by 1 % in place of 30 %.
    """
    reads = [n for n in map(graph.nodes.__getitem__, graph.live()) if n.op == "read" and gemm.k in n.axes]
    block = sum(prod(schedule.block(a) for a in n.axes) * itemsize(n.dtype) for n in reads)
    small = schedule.block(gemm.m) < 64  # the loop of the smaller instruction has one block less than stages
    return max(schedule.stages, min(8, SHARED_MEMORY // 2 // block + 1 + small))
