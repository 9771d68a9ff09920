"""Good schedules for GEMMs: tiles by the number of rows, parts of the contracted axis, stages, pairs and prefetch.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

from moekit.compile.rules.rows import TOGETHER, alone, other_axis, shrunk
from moekit.compile.rules.sections import sections
from moekit.compile.schedule.cuts import cut
from moekit.compile.schedule.directives import (
    Axis,
    Launch,
    Loop,
    Pair,
    Parts,
    Prefetch,
    Section,
    Split,
    Stages,
    Tile,
    Whole,
    pow2,
)
from moekit.compile.schedule.facts import (
    GemmAxes,
    axis_uses,
    equally_deep,
    first_gemm,
    gemms,
    loaded,
    once,
    paired,
    reach,
    scattered,
    shares,
)
from moekit.compile.schedule.legal import pairable, prefetchable
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.dtypes import STORED, is_float, itemsize
from moekit.lang.graph import Graph

GEMM_COLUMNS = (32, 64, 128)  # blocks of a GEMM's columns: the first that leaves room for ENOUGH_PARTS
MOST_PARTS, ENOUGH_PARTS = 8, 4
LEAST_DEPTH = 256  # of the contracted axis, in one part
LEAST_SCALED = 512  # of one in blocks with scales, down to which an SM has two programs of a split
TURNS_UNDER_WAY = 4  # of such a program
WORTH_A_LAUNCH = 1024  # so much less of the contracted axis a split's programs must have for the launch that adds up
WIDE = 4  # bytes of float32, which the matrix unit does not take
WIDE_ROWS = 2048  # of float32, from which on a split is not worth its scratch
LEAST_BLOCK = 64  # of the contracted axis, where a block of few rows has more columns than 32
MANY_ROWS = 128
HELD, MOST_WARPS = 1024, 8  # elements of a block for each warp, where three such blocks are held
PAIRED_ROWS = 64  # from here on the matrix unit takes its left operand from shared memory
MOST_LINES = 4  # of a weight that a lane asks for ahead: larger blocks are those of many rows, whose programs share a weight


class Block(NamedTuple):
    """A block of a GEMM for calls of `least` rows and more. `in_a_row`: a program does all parts of the contracted axis."""

    least: int
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    in_a_row: bool = False


GEMM_TILES = (
    Block(0, 16, 32, 256, 4, 4),
    Block(17, 64, 32, 128, 4, 4),
    Block(65, 128, 32, 64, 8, 4),
)
SHALLOW_TILES = (  # of a GEMM no deeper than LEAST_BLOCK: one step
    Block(0, 16, 32, LEAST_BLOCK, 4, 4),
    Block(17, 32, 32, LEAST_BLOCK, 4, 4),
    Block(65, 64, 64, LEAST_BLOCK, 8, 4),
    Block(129, 64, 64, LEAST_BLOCK, 4, 4),
)
# Of operands that are converted from float8: in blocks of fewer than 64 rows the matrix unit takes these in another order
# (rules/order.py), so all have fewer.
CONVERTED_TILES = (
    GEMM_TILES[0],
    Block(17, 32, 64, 64, 4, 8),
    Block(257, 32, 128, 64, 4, 4, in_a_row=True),
)
# For more rows, each as long as it has no more programs than there are SMs, then the next: a second round of programs costs
# more than a larger tile does. The first two are of a split, the others' programs do all parts.
SPLIT_TILES = (Block(0, 64, 64, 64, 4, 8), Block(0, 128, 64, 64, 8, 5))
MANY_ROWS_TILES = (
    Block(0, 64, 64, 64, 4, 8, in_a_row=True),
    Block(0, 64, 128, 64, 4, 6, in_a_row=True),
    Block(0, 128, 128, 64, 8, 4, in_a_row=True),
)


@once
def tiles(graph: Graph) -> tuple[Block, ...]:
    """The blocks of a graph's GEMM, for ever more rows: each as soon as smaller ones are too many; one where they would say how
    something is added up.
    """
    gemm = next((g for g in gemms(graph).values() if graph.axes[g.m] is None), None)
    if gemm is None or not products_alone(graph):
        return GEMM_TILES[:1]
    if _itemsize(graph, gemm) == WIDE:  # all have the same tile, and parts in place of a split where those are many
        return GEMM_TILES[0], GEMM_TILES[0]._replace(least=WIDE_ROWS, in_a_row=True)
    if any(loaded(graph, a).dtype in STORED for i in gemms(graph) for a in graph.nodes[i].args):
        return CONVERTED_TILES
    if (graph.axes[gemm.k] or LEAST_BLOCK + 1) <= LEAST_BLOCK:
        return SHALLOW_TILES
    split, columns = splitting(graph)
    parts = split.count if split else 1
    twice = 1 + _two_an_sm(graph, gemm, parts, columns)
    found, few, least = list(GEMM_TILES[:2]), GEMM_TILES[2], GEMM_TILES[2].least
    for tile in (*(SPLIT_TILES if split else ()), *MANY_ROWS_TILES):
        if split and tile.in_a_row and least == few.least:  # no larger tile of a split would do
            found.append(few)
            least = MANY_ROWS
        across = -(-_gemm_outputs(graph, gemm) // tile.columns) * (1 if tile.in_a_row else parts)
        most = tile.rows * (MEASURED.sms * (1 if tile.in_a_row else twice) // across)
        if most >= least or tile == MANY_ROWS_TILES[-1]:
            found.append(tile._replace(least=least))
            least = most + 1
    return tuple(found)


def products_alone(graph: Graph) -> bool:
    """Whether all that is added up are products of the same rows along the same axis, those of a section with the same columns.

    A tile then says nothing of how, and programs may do all parts of a split in a row: nothing waits for a whole row of them,
    no output runs along the axis, and none is put at ids.
    """
    sums = [(g, {gemms(graph).get(i) for i in g.live() if _adds(graph, i)}) for g in sections(graph)]
    if any(own and (len(own) > 1 or None in own or not first_gemm(g)) for g, own in sums):
        return False
    found = [gemm for _, own in sums for gemm in own if gemm]
    if len({(g.m, g.k) for g in found}) != 1:
        return False
    put = any({g.m, g.n} & scattered(graph) for g in found)
    return not put and not any(found[0].k in reach(graph, w) for w in graph.writes)


def _adds(graph: Graph, node: int) -> bool:
    """Whether a node brings floats together, but for products of one row and column added up one by one."""
    n = graph.nodes[node]
    one_by_one = n.op == "reduce" and any(n.attr("axis") in turns(graph, gemm) for gemm in gemms(graph).values())
    return n.op in TOGETHER and is_float(n.dtype) and not one_by_one


@once
def turns(graph: Graph, gemm: GemmAxes) -> tuple[str, ...]:
    """The static axes along which a GEMM is one product after another, added up as they come: each in a scale of its own."""
    products = [graph.nodes[i] for i, g in gemms(graph).items() if g == gemm]
    found = (a for a, u in axis_uses(graph).items() if u.reduced and u.extent and a not in (gemm.m, gemm.n))
    return tuple(a for a in found if all(a in n.axes for n in products))


def _depth(graph: Graph, gemm: GemmAxes) -> tuple[str, int]:
    """The axis of a GEMM that can be split, and all that is added up along it and within."""
    outer = turns(graph, gemm)
    sizes = [graph.axes[a] or 0 for a in (*outer, gemm.k)]
    return outer[0] if outer else gemm.k, prod(sizes)


def _itemsize(graph: Graph, gemm: GemmAxes) -> int:
    """Bytes of an element of a GEMM's operands."""
    found = [graph.nodes[i] for i, g in gemms(graph).items() if g == gemm]
    return max(itemsize(graph.nodes[a].dtype) for n in found for a in n.args)


@once
def splitting(graph: Graph) -> tuple[Split | None, int]:
    """The contracted axis to split and in how many parts, so that a small GEMM's weight is read by all SMs; and its columns.

    A program reads its rows of x for all its columns at once, so wider blocks read less where four parts have room beside them.

    A GEMM whose outputs go on to what needs whole rows (a norm's scale, a routing) is split in any case: the first launch makes
    products, the second has programs of other kinds.
    """
    for gemm in gemms(graph).values():
        axis, depth = _depth(graph, gemm)
        if {gemm.m, gemm.n} & scattered(graph) or not equally_deep(graph, axis) or graph.axes[gemm.k] is None:
            continue
        if not any(first_gemm(g) for g in sections(cut(graph, Split(axis, 2))[0])):
            continue
        outputs = _gemm_outputs(graph, gemm)
        most = {columns: _parts(-(-outputs // columns), depth) for columns in GEMM_COLUMNS}
        columns = max(GEMM_COLUMNS, key=lambda c: (min(most[c], ENOUGH_PARTS), -c))
        alone = any(first_gemm(g) for g in sections(graph))
        parts = most[columns] if alone else max(2, most[columns])
        doubled = 2 * parts * -(-outputs // columns) <= 2 * MEASURED.sms and depth >= 2 * parts * LEAST_SCALED
        parts *= 2 if parts > 1 and doubled and turns(graph, gemm) else 1
        return (Split(axis, parts) if parts > 1 else None), columns
    return None, GEMM_COLUMNS[0]


def _parts(blocks: int, depth: int) -> int:
    """How many parts leave each SM one program at the most; 1 where they are not worth a launch."""
    parts = 1
    while parts < MOST_PARTS and 2 * parts * blocks <= MEASURED.sms and depth >= 2 * parts * LEAST_DEPTH:
        parts *= 2
    return parts if depth - depth // parts >= WORTH_A_LAUNCH else 1


def _two_an_sm(graph: Graph, gemm: GemmAxes, parts: int, columns: int) -> bool:
    """Whether a split in blocks with scales has more programs than there are SMs, of blocks of so many columns."""
    return parts > 1 and bool(turns(graph, gemm)) and parts * -(-_gemm_outputs(graph, gemm) // columns) > MEASURED.sms


def _gemm_outputs(graph: Graph, gemm: GemmAxes) -> int:
    """Columns that all contractions over the same axis and rows write."""
    found = [g for g in gemms(graph).values() if (g.k, g.m) == (gemm.k, gemm.m)]
    return sum(graph.axes[g.n] or 0 for g in found)


def gemm_launch(graph: Graph, gemm: GemmAxes, tile: Block, few: int, in_a_row: Split | None) -> Launch:
    """One GEMM's programs: `few` columns a block where there are few rows; the parts of `in_a_row` one after the other."""
    uses, wide = axis_uses(graph), _itemsize(graph, gemm) == WIDE
    depth, outer, split = uses[gemm.k].extent or 64, turns(graph, gemm), _depth(graph, gemm)[0]
    several = in_a_row.count if in_a_row and in_a_row.axis == split else shares(graph).get(split, 1)
    _, rows, columns, k_block, warps, stages, _ = tile
    fills = several > 1 and columns == GEMM_COLUMNS[0] and not wide
    if wide:
        rows, columns, k_block, warps, stages = 16, GEMM_COLUMNS[0], 32, 4, 3
    elif columns == GEMM_COLUMNS[0]:
        columns, k_block = few, max(LEAST_BLOCK, k_block * columns // few)  # as much of the weight at a time
    if outer and not wide:  # all of one element of the outer axis at a time; its product, the sum and a part's are held
        k_block, stages = pow2(depth), max(2, min(stages, stages * k_block // pow2(depth)))
        warps = MOST_WARPS if rows * columns > HELD * warps else warps
        if fills and _two_an_sm(graph, gemm, several, few):
            fills, stages = False, TURNS_UNDER_WAY
    elif not wide and several > 1 and depth % (several * GEMM_TILES[0].depth):  # else the tile would say where a part begins
        k_block, stages = 128, max(2, min(stages, stages * k_block // 128))
    accumulators = sum(g == gemm for g in gemms(graph).values())
    columns = max(16, min(columns // accumulators, pow2(uses[gemm.n].extent or columns)))
    wanted: dict[str, Axis] = {a: Tile(a, 1 if a in scattered(graph) else b) for a, b in ((gemm.m, rows), (gemm.n, columns))}
    if not uses[gemm.k].whole:
        k_block = max(16, min(pow2(depth), k_block))
        wanted[gemm.k] = Loop(gemm.k, 1 if gemm.k in scattered(graph) else k_block)
    if outer:
        wanted |= {a: Loop(a, 1) for a in outer} | ({gemm.k: Whole(gemm.k, k_block)} if k_block >= depth else {})
    launch = alone((wanted.get(a) or other_axis(use) for a, use in uses.items()), warps, stages)
    if fills:
        launch = launch.but(Stages(_filling(graph, launch.sections[0], gemm, stages)))
    launch = shrunk(graph, launch)
    if in_a_row and in_a_row.axis in uses:
        launch = replace(launch, sections=(launch.sections[0].but(Parts(in_a_row.axis, in_a_row.count)),))
    return launch


def obliging(graph: Graph, section: Section, warps: int) -> Section:
    """The section with its products paired, and its weights asked for ahead, where that pays."""
    section = section.without(Pair, Prefetch)
    for tensor, pair in paired(graph).items():
        looped = isinstance(section.axis(graph.nodes[pair.nodes[0]].attr("axis")), Loop)
        if looped and pairable(graph, section, tensor) and _rows(graph, section, pair.nodes[0], pair.column) >= PAIRED_ROWS:
            section = section.but(Pair(tensor))
    for tensor, reads in prefetchable(graph, section).items():
        if all(_lines(graph, section, *r) <= MOST_LINES * MEASURED.lanes * warps for r in reads):
            section = section.but(Prefetch(tensor))
    return section


def _rows(graph: Graph, section: Section, product: int, column: str) -> int:
    """The rows of a product's tile."""
    return max(section.block(a) for a in graph.nodes[product].axes if a != column)


def _lines(graph: Graph, section: Section, node: int, along: int) -> float:
    """Lines of memory of a weight that a program reads."""
    n = graph.nodes[node]
    (axis,) = n.attr("index")[along].axes
    share = (graph.axes[axis] or 0) // shares(graph).get(axis, 1)
    return prod(section.block(a) for a in n.axes if a != axis) * share * itemsize(n.dtype) / MEASURED.line


def deeper(graph: Graph, section: Section, stages: int) -> Section:
    """One section among others, twice as deep where its programs do all parts of few columns.

    Such a program loads little beside its rows, and waits for them all the same: it needs as much under way as the others have.
    """
    gemm = first_gemm(graph)
    if gemm is None or not section.parts:
        return section
    rows, columns, depth = (section.block(a) for a in (gemm.m, gemm.n, gemm.k))
    length = -(-(graph.axes[gemm.k] or 0) // next(iter(section.parts.values())))
    held = 2 * depth * (rows + columns) * _itemsize(graph, gemm) * stages
    if 4 * columns > rows or length % (2 * depth) or held > MEASURED.shared_memory:
        return section
    return section.but(Loop(gemm.k, 2 * depth))


def _filling(graph: Graph, section: Section, gemm: GemmAxes, stages: int) -> int:
    """So many stages that a program's blocks take more than half of an SM's shared memory.

    The next launch's programs come while this one's still run, and where two fit on an SM, the SMs that stand empty get two
    each, which then share what one could have.
    """
    reads = [n for n in graph.live_nodes("read") if gemm.k in n.axes]
    block = sum(prod(map(section.block, n.axes)) * itemsize(n.dtype) for n in reads)
    small = section.block(gemm.m) < 64  # the loop of the smaller instruction has one block less than stages
    return max(stages, min(8, MEASURED.shared_memory // 2 // block + 1 + small))
