"""Facts about a Graph, each computed once: what it does with its axes, its products, what lives on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate

from moekit.lang.dtypes import STORED
from moekit.lang.graph import Graph, Index, Node, end_of


def once[**P, R](fact: Callable[Concatenate[Graph, P], R]) -> Callable[Concatenate[Graph, P], R]:
    """A fact about a graph: computed when it is first asked for, and kept with the graph, which never changes."""

    @wraps(fact)
    def kept(graph: Graph, *args: P.args, **named: P.kwargs) -> R:
        facts = vars(graph).setdefault("_facts", {})
        key = (fact.__module__, fact.__qualname__, *args, *named.items())
        if key not in facts:
            facts[key] = fact(graph, *args, **named)
        return facts[key]

    return kept


@dataclass(frozen=True)
class AxisUse:
    """How a graph uses one axis. `in_turns`: values are handed on along it."""

    name: str
    extent: int | None
    reduced: bool
    whole: bool
    parallel: bool
    in_turns: bool = False


@dataclass(frozen=True)
class GemmAxes:
    """A contraction over `k` of operands that vary over `m` and `n` apart: what a matrix unit can do."""

    m: str
    n: str
    k: str


def part_axis(axis: str) -> str:
    """The name of the axis that counts the parts of a split axis."""
    return f"{axis}.part"


PART = part_axis("")  # what the name of every such axis ends with
PRODUCTS = ("contract", "exp_sum")  # sums of products, which a matrix unit can make: their first two operands are the sides
FOLDS = ("reduce", *PRODUCTS)  # operations that bring the elements of an axis together


def twice_axis(axis: str) -> str:
    """The name of the axis along which two blocks of an axis stand side by side."""
    return f"{axis}.twice"


@once
def scattered(graph: Graph) -> set[str]:
    """The axes along which `put` ids vary; what is placed goes to scratch, where blocks of any size can be stored."""
    put = [w for w in graph.writes if w.declared or graph.tensors[w.tensor].role != "Out"]
    return {a for w in put for n in w.ids for a in graph.nodes[n].axes}


def reach(graph: Graph, write) -> set[str]:
    """The axes along which a write spreads."""
    axes = {a for i in write.index for a in i.axes}
    return axes | {a for n in write.ids for a in graph.nodes[n].axes}


@once
def axis_uses(graph: Graph) -> dict[str, AxisUse]:
    """Every axis that a live node or a write varies over, in the graph's order."""

    def along(*ops: str) -> set[str]:
        return {n.attr("axis") for n in graph.live_nodes(*ops)}

    reduced, scanned, turns = along(*FOLDS), along("cumsum"), along("before")
    whole = {a for a in scanned if graph.axes[a] is not None} | along("top_k")
    whole |= {n.attr("into") for n in graph.live_nodes("top_k")}
    whole |= {a for n in graph.live_nodes("all_reduce") for a in graph.nodes[n.args[0]].axes[1:]}
    whole |= {graph.tensors[name].dims[d].axis for name, dims in graph.elsewhere.items() for d in dims}
    spreads = [reach(graph, w) for w in graph.writes]
    used = set().union(*spreads, *(n.axes for n in graph.live_nodes()))
    parallel = set.intersection(*spreads) - (reduced | whole | scanned | turns)
    return {
        a: AxisUse(a, size, a in reduced, a in whole, a in parallel, a in turns) for a, size in graph.axes.items() if a in used
    }


@once
def within_turns(graph: Graph) -> frozenset[int]:
    """The nodes that are made of what turns hand on, each in its turn: one program makes all of them."""
    found: set[int] = set()
    for i in graph.live():
        n = graph.nodes[i]
        if n.op == "before" or (n.op != "after" and found & {*n.args}):
            found.add(i)
    return frozenset(found)


@once
def gathered(graph: Graph) -> set[str]:
    """Axes of tensors that are indexed by values, or past their ends: needed for range checks."""
    reads = ((n.attr("tensor"), d, e) for n in graph.live_nodes("read") for d, e in enumerate(n.attr("index")))
    past = [(name, d) for name, d, e in reads if not graph.inside(name, d, e)]
    put = [(w.tensor, d) for w in graph.writes for d, e in enumerate(w.index) if e.operands]
    return {graph.tensors[name].dims[d].axis for name, d in (*past, *put)}


@once
def gemms(graph: Graph) -> dict[int, GemmAxes]:
    """The live contractions with one private axis or more on each side, each with the largest of these."""
    return {i: found for i in graph.live() if graph.nodes[i].op == "contract" and (found := _gemm(graph, graph.nodes[i]))}


def _gemm(graph: Graph, n: Node) -> GemmAxes | None:
    left, right = (set(graph.nodes[a].axes) for a in n.args)
    rows, columns = left - right, right - left
    if not rows or not columns:
        return None

    def size(axis: str) -> float:
        extent = graph.axes[axis]
        return float("inf") if extent is None else extent

    return GemmAxes(max(graph.ordered(rows), key=size), max(graph.ordered(columns), key=size), n.attr("axis"))


@once
def first_gemm(graph: Graph, least: int = 16) -> GemmAxes | None:
    """The first contraction of `least` elements that can run on the matrix unit, its rows and columns on the grid."""
    uses = axis_uses(graph)
    for gemm in gemms(graph).values():
        if all(uses[a].parallel for a in (gemm.m, gemm.n)) and (uses[gemm.k].extent or least) >= least:
            return gemm
    return None


@once
def shares(graph: Graph) -> dict[str, int]:
    """The axes of which each program of a split's first launch has a part, and how many parts there are."""
    parts = {a: use for a, use in axis_uses(graph).items() if a.endswith(PART)}
    return {a.removesuffix(PART): use.extent or 1 for a, use in parts.items() if use.parallel}


def operands(node: Node) -> tuple[int, ...]:
    """What a node is computed from; the maximum of an `exp_sum`'s scores is made along with it, of the same operand."""
    return node.args[:2] if node.op == "exp_sum" else node.args


def folded(node: Node) -> str | None:
    """The axis that a node folds; None for one that folds none."""
    return node.attr("axis") if node.op in FOLDS else None


@once
def ends(graph: Graph, node: int) -> int | None:
    """The int32 value of which a fold's operands are the fold's identity from that element of its axis on; None if none is.

    `where(iota(axis) < end, x, identity)` says so, of every operand that varies along the axis.
    """
    n = graph.nodes[node]
    kinds = {"reduce": lambda: (n.attr("kind"),), "contract": lambda: ("sum", "sum"), "exp_sum": lambda: ("max", "sum")}[n.op]()
    pairs = [(a, kind) for a, kind in zip(operands(n), kinds, strict=True) if graph.nodes[a].op != "const"]
    found = {end_of(graph.nodes, a, n.attr("axis"), kind) for a, kind in pairs}
    return found.pop() if len(found) == 1 else None


@once
def all_or_nothing(graph: Graph, end: int, axis: str) -> bool:
    """Whether a fold that ends there has all of an axis or nothing of it: the end is a choice between the two."""

    def outside(n: Node) -> bool:
        size = graph.axes[axis]
        number = n.op == "const" and (n.attr("value") <= 0 or (size is not None and n.attr("value") >= size))
        return number or (n.op == "extent" and n.attr("axis") == axis)

    n = graph.nodes[end]
    return n.op == "where" and all(outside(graph.nodes[a]) for a in n.args[1:])


@once
def ragged(graph: Graph) -> frozenset[str]:
    """The axes along which the ends of folds vary: a program with one element of each can stop at its own."""
    found = (ends(graph, i) for i in graph.live() if folded(graph.nodes[i]))
    return frozenset(a for end in found if end is not None for a in graph.nodes[end].axes)


def loaded(graph: Graph, node: int) -> Node:
    """What an operand is, behind a choice of whether there is any, and behind the cast of what is only stored."""
    n = behind(graph, node)[0]
    return graph.nodes[n.args[0]] if n.op == "cast" and graph.nodes[n.args[0]].dtype in STORED else n


def behind(graph: Graph, node: int) -> tuple[Node, tuple[tuple[int, int], ...]]:
    """What an operand is behind choices, and these: each condition, with what there is where it does not hold."""
    n = graph.nodes[node]
    if n.op != "where":
        return n, ()
    inner, choices = behind(graph, n.args[1])
    return inner, ((n.args[0], n.args[2]), *choices)


def reduction_levels(graph: Graph, axes: set[str]) -> tuple[dict[int, int], set[int]]:
    """For every live node how many reductions over `axes` lie beneath it in a row; and the set of reductions' depths."""
    level: dict[int, int] = {}
    depths: set[int] = set()
    for i in graph.live():
        node = graph.nodes[i]
        level[i] = max((level[a] for a in operands(node)), default=0)
        if node.op in (*FOLDS, "after") and node.attr("axis") in axes:
            depths.add(level[i])
            level[i] += 1
    return level, depths


@once
def equally_deep(graph: Graph, axis: str) -> bool:
    """Whether all reductions over `axis` are equally deep, so that one launch can make partial results of them all."""
    return len(reduction_levels(graph, {axis})[1]) == 1


@once
def read(graph: Graph) -> frozenset[str]:
    """The tensors that are read."""
    return frozenset(n.attr("tensor") for n in graph.live_nodes("read"))


@dataclass(frozen=True)
class Twins:
    """Products `nodes` of node `left` with two blocks of columns of a tensor.

    Node `right` reads it along dimension `dim` from `first` on, behind choices or not; another one, alike, from `second` on. A
    gate and an up projection are such a pair. The matrix unit reads its left operand from shared memory for each product anew,
    and two accumulators in a loop without gaps keep Triton 3.6's products from overlapping; one product twice as wide gives
    the same sums, in the same order.
    """

    nodes: tuple[int, int]
    left: int
    right: int
    dim: int
    first: Index
    second: Index

    @property
    def column(self) -> str:
        """The axis of the columns, of which a program holds two blocks."""
        return innermost(self.first)[0]


@once
def paired(graph: Graph) -> dict[str, Twins]:
    """Tensors of which two blocks of columns are multiplied by one left operand, with the two products."""
    found: dict[str, Twins] = {}
    products = [i for i in graph.live() if graph.nodes[i].op == "contract"]
    for n, a in enumerate(products):
        for b in products[n + 1 :]:
            mine, others = (set(graph.nodes[i].args) for i in (a, b))
            same = mine & others
            if len(mine) == len(others) == 2 and len(same) == 1 and graph.nodes[a].attr("axis") == graph.nodes[b].attr("axis"):
                (left,), (right,), (other,) = same, mine - same, others - same
                (one, two), (choices, alike) = ([f(graph, x) for x in (right, other)] for f in (loaded, _choices))
                dim = apart(graph, one, two) if choices == alike else None
                if dim is not None:
                    pair = Twins((a, b), left, right, dim, one.attr("index")[dim], two.attr("index")[dim])
                    if not any(pair.column in graph.nodes[i].axes for choice in choices for i in choice):
                        found.setdefault(one.attr("tensor"), pair)
    return found


def _choices(graph: Graph, node: int) -> tuple:
    return behind(graph, node)[1]


def innermost(index: Index) -> tuple[str, int]:
    """The axis of an index with the smallest step, and that."""
    return min(((axis, step) for axis, step in index.terms if isinstance(axis, str)), key=lambda term: term[1])


def apart(graph: Graph, one: Node, other: Node) -> int | None:
    """The one dimension in which two reads of a tensor are along the same axis from different elements on."""
    if one.op != "read" or other.op != "read" or one.attr("tensor") != other.attr("tensor") or one.args != other.args:
        return None
    pairs = list(zip(one.attr("index"), other.attr("index"), strict=True))
    differ = [d for d, (i, j) in enumerate(pairs) if i != j]
    if len(differ) != 1:
        return None
    i, j = pairs[differ[0]]
    inside = all(graph.inside(one.attr("tensor"), differ[0], x) for x in (i, j))
    return differ[0] if inside and i.terms == j.terms and i.axes and not i.operands else None
