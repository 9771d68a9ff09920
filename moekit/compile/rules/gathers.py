"""Good schedules for products with gathered matrices.

Those that are added up, as a routed expert's down projection is for few tokens: every pair of a row and one of its matrices has
programs of its own, so that one row alone gives programs enough, and a second launch adds up a row's pairs in their order. A
program reads 128 bytes of each of a matrix's rows. And those of blocks of rows that share a matrix: one block a program, on the
matrix unit, which has 16 rows even where a block has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from moekit.compile.passes.sides import LEAST
from moekit.compile.rules.gemm import turns
from moekit.compile.rules.rows import alone, other_axis, shrunk
from moekit.compile.schedule.cost import in_flight
from moekit.compile.schedule.cuts import stageable
from moekit.compile.schedule.directives import Axis, Dependent, Launch, Loop, Pair, Split, Stage, Stages, Tile, Whole, pow2
from moekit.compile.schedule.facts import GemmAxes, axis_uses, equally_deep, first_gemm, gemms, loaded, once, operands, paired
from moekit.compile.schedule.legal import least_depth, pairable
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.dtypes import STORED, itemsize
from moekit.lang.graph import Graph, Node

COLUMNS_BYTES = 128
MOST_WHOLE, STEP = 512, 64  # of the contracted axis: in one block up to so many, else so many at a time
MOST_PAIRS = 64
MOST_ROWS, PAIRED_FROM = 128, 64  # of a block of pairs, and from which on two products are one
PAIRED_SCALED = 32  # in blocks with scales
MOST_DEEP = 128  # of the contracted axis, where each block of it has a scale of its own: up to so much is one turn
ROWS_BLOCK, PAIRS_BLOCK = 2**14, 2**13  # one-byte elements of a program's block, and of one where pairs are added up
MOST_COLUMNS, TURN = 64, 2  # a program's most rows, and pairs in a turn


class Products(NamedTuple):
    """Columns of all of a program's products, how much of the contracted axis a turn has; warps and stages."""

    columns: int
    depth: int
    warps: int
    stages: int


# By the least rows of a block: where matrices lie along the contracted axis, and where along their columns.
PRODUCTS = {
    1: (Products(64, 128, 4, 4), Products(64, 64, 4, 4)),
    16: (Products(128, 128, 8, 3), Products(256, 64, 8, 3)),
    64: (Products(128, 64, 4, 3), Products(128, 64, 4, 3)),
    128: (Products(128, 64, 4, 3), Products(128, 32, 4, 4)),
}
# In blocks with scales, a turn's products beside the sums: of several products at once, and of one.
SCALED = {
    1: (Products(128, 128, 4, 3), Products(128, 128, 4, 3)),
    32: (Products(128, 128, 4, 3), Products(64, 128, 4, 3)),
    128: (Products(64, 128, 4, 3), Products(64, 128, 4, 3)),
}
# Of float8 with float8: 64 rows, or else columns, on the left, as other instructions add up fewer (rules/order.py).
FLOAT8 = {
    1: (Products(128, 128, 4, 3), Products(128, 128, 4, 3)),
    64: (Products(128, 128, 4, 3), Products(64, 128, 4, 3)),
    128: (Products(128, 128, 8, 4), Products(64, 128, 4, 3)),
}
CODED = 4096  # elements of a program that makes float8 of them, by four warps
WIDE = Products(32, 32, 4, 1)  # of float32, beside the matrix unit: blocks of products leave no room for the next turn's loads


@once
def gathered_product(graph: Graph) -> Launch | None:
    """What comes before a split of a graph whose gathered matrices have their columns side by side in memory."""
    uses = axis_uses(graph)
    for number in graph.live():
        node = graph.nodes[number]
        found = _columns(graph, node) if node.op == "contract" else None
        pairs = [a for a, u in uses.items() if found and a in node.axes and u.reduced and 1 < (u.extent or 0) <= MOST_PAIRS]
        if not found or len(pairs) > 1 or not uses[found].parallel or (not pairs and number in gemms(graph)):
            continue
        size = max(itemsize(graph.nodes[a].dtype) for a in node.args)
        deep, over = uses[node.attr("axis")].extent, node.attr("axis")
        whole = deep is not None and pow2(deep) <= MOST_WHOLE
        said: dict[str, Axis] = {found: Tile(found, min(COLUMNS_BYTES // size, pow2(uses[found].extent or 1)))}
        said |= {over: Whole(over, pow2(deep or 1)) if whole else Loop(over, STEP)} | {a: Loop(a, 1) for a in pairs}
        launch = alone((said.get(a) or other_axis(u) for a, u in uses.items()), stages=1 if whole else 3)
        if not pairs:
            return launch
        return launch.but(Split(pairs[0], uses[pairs[0]].extent or 1)) if equally_deep(graph, pairs[0]) else None
    return None


@once
def gathered_rows(graph: Graph) -> Launch | None:
    """Programs of whole rows of gathered matrices of one-byte elements, which lie along what is contracted.

    Where a row's pairs are added up, a program does so, some at a time.
    """
    uses = axis_uses(graph)
    for number in graph.live():
        node = graph.nodes[number]
        read = next(filter(_short, (loaded(graph, a) for a in node.args)), None) if node.op == "contract" else None
        if read is None or number in gemms(graph) or node.attr("axis") not in read.attr("index")[-1].axes:
            continue
        inner, column = read.attr("index")[-1].axes, read.attr("index")[-2].axes[-1:]
        pairs = [a for a in node.axes if uses[a].reduced and a not in inner]
        static = all(uses[a].extent for a in (*inner, *column, *pairs))
        if not (static and column and uses[column[0]].parallel) or len(pairs) > 1:
            continue
        depths = {a: pow2(uses[a].extent or 1) for a in inner}
        many = PAIRS_BLOCK // TURN // prod(depths.values()) if pairs else ROWS_BLOCK // prod(depths.values())
        if many < 1:
            continue
        said: dict[str, Axis] = {column[0]: Tile(column[0], min(MOST_COLUMNS, many, pow2(uses[column[0]].extent or 1)))}
        said |= {a: Whole(a, depth) for a, depth in depths.items()} | {a: Loop(a, TURN) for a in pairs}
        return alone((said.get(a) or other_axis(u) for a, u in uses.items()), warps=4, stages=3 if pairs else 1)
    return None


@once
def summands(graph: Graph) -> Stage | None:
    """What is added up by itself where a row's pairs are, and a product of rows beside them: that product and each pair's.

    One launch makes both, the product on the matrix unit; the next adds them up and reads few bytes.
    """
    launch, uses, found = gathered_product(graph) or gathered_rows(graph), axis_uses(graph), stageable(graph)
    along = {n.attr("axis") for n in graph.live_nodes("contract")}
    loops = launch.sections[0].all(Loop) if launch and gemms(graph) else ()
    pairs = [d.axis for d in loops if d.axis not in along]
    if len(pairs) != 1:
        return None
    made: dict[int, set[int]] = {}  # by node, the products that it is made of
    for i in sorted(graph.live()):
        own = {i} if graph.nodes[i].op == "contract" else set()
        made[i] = own.union(*(made.get(a, set()) for a in operands(graph.nodes[i])))
    whole = {name: i for name, i in found.items() if not {a for a in graph.nodes[i].axes if uses[a].reduced} - {*pairs}}
    sides = (
        [name for name, i in whole.items() if made[i] and made[i] <= {*gemms(graph)}],
        [name for name, i in whole.items() if made[i] and pairs[0] in graph.nodes[i].axes],
    )
    size = {name: itemsize(graph.nodes[i].dtype) for name, i in whole.items()}
    return Stage(",".join(min(side, key=size.__getitem__) for side in sides)) if all(sides) else None


@once
def coded(graph: Graph) -> Stage | None:
    """An operand of a grouped product that is rounded to float8, and folds of what it is made of, where no product is."""
    sides = {a for i in gemms(graph) for a in graph.nodes[i].args if graph.nodes[a].dtype in STORED}
    for side in (a for a in sides if graph.nodes[a].op == "cast"):
        made = {side}
        for i in range(side, -1, -1):
            made |= {*operands(graph.nodes[i])} if i in made else set()
        names = [v for v, i in stageable(graph).items() if i == side or (i in made and graph.nodes[i].op == "reduce")]
        if names and not any(graph.nodes[i].op == "contract" for i in made):
            return Stage(",".join(names))
    return None


@once
def coding(graph: Graph) -> Launch | None:
    """Programs of blocks that become float8, each by the largest magnitude along an axis that they hold whole."""
    uses, made = axis_uses(graph), [graph.nodes[w.value] for w in graph.writes]
    over = {n.attr("axis") for n in graph.live_nodes("reduce")}
    inner = {a for a in over if uses[a].extent}
    if not any(n.op == "cast" and n.dtype in STORED for n in made) or any(graph.live_nodes("contract")) or over - inner:
        return None
    said: dict[str, Axis] = {a: Whole(a, pow2(uses[a].extent or 1)) for a in inner}
    left = max(1, CODED // prod(d.block for d in said.values()))
    static, dynamic = ([a for a, u in uses.items() if u.parallel and (u.extent is None) == rows] for rows in (False, True))
    for a in (*reversed(static), *dynamic):  # a row's own blocks first
        tile = Tile(a, min(left, pow2(uses[a].extent or left)))
        said[a], left = tile, left // tile.block
    return alone((said.get(a) or other_axis(u) for a, u in uses.items()), warps=4, stages=1)


@once
def grouped(graph: Graph) -> Launch | None:
    """Programs of products of blocks of rows with one gathered matrix each; the same order of sums whatever the block."""
    gemm = first_gemm(graph, 1)  # fewer than the unit takes, too: as lanes would add them up, a block's other rows would matter
    found = [graph.nodes[i] for i, g in gemms(graph).items() if g == gemm]
    if gemm is None or not all(_chosen(graph, n) for n in found):
        return None
    uses, outer = axis_uses(graph), turns(graph, gemm)
    rows, each = _tile(graph, gemm, found)
    columns = max(MEASURED.matrix, min(each.columns // len(found), pow2(uses[gemm.n].extent or 1)))
    least = max(least_depth(graph, i) for i, g in gemms(graph).items() if g == gemm)
    depth = max(least, min(each.depth, pow2(uses[gemm.k].extent or each.depth)))
    said: dict[str, Axis] = {gemm.m: Tile(gemm.m, rows), gemm.n: Tile(gemm.n, columns), gemm.k: Loop(gemm.k, depth)}
    if outer:
        deep = pow2(uses[gemm.k].extent or MOST_DEEP + 1)
        said |= {gemm.k: Whole(gemm.k, max(least, deep)) if deep <= MOST_DEEP else said[gemm.k]}
        said |= {a: Loop(a, 1) for a in outer}
    shallow = {g.k: n for i, g in gemms(graph).items() if (uses[g.k].extent or MEASURED.matrix) < (n := least_depth(graph, i))}
    said = {a: Whole(a, n) for a, n in shallow.items()} | said
    axes = [said.get(a) or other_axis(u) for a, u in uses.items()]
    launch = shrunk(graph, alone(axes, each.warps, each.stages))
    pair = rows >= (PAIRED_SCALED if outer else PAIRED_FROM)
    pairs = [Pair(name) for name in paired(graph) if pair and pairable(graph, launch.sections[0], name)]
    launch = replace(launch, sections=(launch.sections[0].but(*pairs),)) if pairs else launch
    if held := in_flight(graph, launch.sections[0]):
        launch = launch.but(Stages(max(1, min(launch.stages, MEASURED.shared_memory // held))))
    return launch.without(Dependent)  # its programs would hold shared memory that the launch before still needs


def _tile(graph: Graph, gemm: GemmAxes, found: Sequence[Node]) -> tuple[int, Products]:
    """Rows of a program of grouped products, and the rest of its block."""
    if max(itemsize(graph.nodes[a].dtype) for n in found for a in n.args) > 2:
        return MEASURED.matrix, WIDE
    block = min(MOST_ROWS, pow2(axis_uses(graph)[gemm.m].extent or MOST_ROWS))
    short, scaled = any(graph.nodes[n.args[0]].dtype in STORED for n in found), bool(turns(graph, gemm))
    table = FLOAT8 if short else SCALED if scaled else PRODUCTS
    ways = table[max(least for least in table if least <= block)]
    second = len(found) == 1 if scaled else any(_columns(graph, n) for n in found)
    few = short and min(ways[second].columns // len(found), axis_uses(graph)[gemm.n].extent or 0) < LEAST
    return max(MEASURED.matrix, block, LEAST if few else 0), ways[second]


def _chosen(graph: Graph, n: Node) -> bool:
    """Whether each block of rows of a product has a matrix of its own, which data choose."""
    uses = axis_uses(graph)
    shared = {a for a in graph.nodes[n.args[0]].axes if a in graph.nodes[n.args[1]].axes and uses[a].parallel}
    return bool(shared) and shared <= _choosing(graph, n)


def _choosing(graph: Graph, product: Node) -> set[str]:
    """The axes along which data say what a product reads."""
    reads = [n for a in product.args if (n := loaded(graph, a)).op == "read"]
    return {a for n in reads for i in n.attr("index") for o in i.operands for a in graph.nodes[n.args[o]].axes}


def _short(read: Node) -> bool:
    """Whether data choose what is read, of one-byte floats, along two dimensions or more."""
    several = read.op == "read" and read.dtype in STORED and len(read.attr("index")) > 1
    return several and any(i.operands for i in read.attr("index")) and not read.attr("index")[-1].operands


def _columns(graph: Graph, node: Node) -> str | None:
    """The innermost axis of a gathered operand of a contraction, if that does not run along it."""
    for read in (loaded(graph, a) for a in node.args):
        if read.op != "read" or not any(i.operands for i in read.attr("index")):
            continue
        inner = read.attr("index")[-1].axes
        return inner[-1] if inner and inner[-1] != node.attr("axis") else None
    return None
