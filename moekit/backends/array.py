"""Array evaluation: the Graph computed with numpy, torch or jax.numpy (libraries.py), whole arrays at a time.

It is the fallback, the autodiff path and the unfused baseline. A node's array has one dimension per axis, in the graph's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moekit.backends.libraries import LIBRARIES, Library
from moekit.errors import ShapeError, UnavailableError
from moekit.lang.elementwise import ELEMENTWISE, IDENTITY
from moekit.lang.graph import Graph, Index, Node, Write
from moekit.lang.turns import unrolled


class _Evaluation:
    """One evaluation: arrays by node. `all`: those of all ranks of a mesh, where one process plays them, in order."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Any], sizes: Mapping[str, int], lib: Library):
        self.graph, self.arrays, self.lib = graph, arrays, lib
        self.sizes = {a: sizes[a] if s is None else s for a, s in graph.axes.items()}
        self.like = next(iter(arrays.values()))
        self.values: dict[int, Any] = {}
        self.used = {a for n in graph.live_nodes() for a in n.args}
        self.all: Sequence[_Evaluation] = ()

    def run(self) -> dict[str, Any]:
        for i in self.graph.live():
            self.make(i)
        return self.written()

    def make(self, i: int) -> None:
        node = self.graph.nodes[i]
        self.values[i] = OPS[node.op](self, i, node)

    def written(self) -> dict[str, Any]:
        return {w.tensor: self._written(w) for w in self.graph.writes}

    def aligned(self, node: int, axes: tuple[str, ...]):
        """A node's array with a dimension of size 1 for every axis of `axes` it does not have."""
        have = self.graph.nodes[node].axes
        return self.values[node][tuple(slice(None) if a in have else None for a in axes)] if have != axes else self.values[node]

    def _written(self, w: Write):
        dims = self.graph.tensors[w.tensor].dims
        if w.ids:
            return self._put(w)
        axes = self.graph.ordered(d.axis for d in dims)
        full = self.lib.expand(self.aligned(w.value, axes), tuple(self.sizes[a] for a in axes))
        return self.lib.transpose(full, tuple(axes.index(d.axis) for d in dims))

    def _put(self, w: Write):
        axes = self.graph.ordered({a for i in w.index for a in i.axes} | {*self.graph.nodes[w.ids[0]].axes})
        index = tuple(self.index(e, w.ids, axes) for e in w.index)
        shape = tuple(self.sizes[a] for a in axes)
        value = self.lib.expand(self.aligned(w.value, axes), shape)
        base = self.arrays[w.tensor]
        return self.lib.scatter(base, tuple(self.lib.expand(i, shape) for i in index), value)

    def index(self, entry: Index, args: tuple[int, ...], axes: tuple[str, ...]):
        """An index array over `axes` for one dimension of a tensor."""
        found: Any = None
        for term, step in entry.terms:
            at = self.along(term, axes) if isinstance(term, str) else self.aligned(args[term], axes)
            at = at if step == 1 else at * step
            found = at if found is None else found + at
        if found is None:
            return self.lib.constant(entry.start, "int32", self.like)
        return found + entry.start if entry.start else found

    def along(self, axis: str, axes: tuple[str, ...]):
        """The elements of an axis, aligned with `axes`."""
        return self.lib.arange(self.sizes[axis], self.like)[tuple(slice(None) if a == axis else None for a in axes)]

    def part(self, entry: Index) -> tuple[Any, list[str]] | None:
        """An index along axes of which each goes over whole turns of the next, as a slice and the axes it is taken apart in;
        None where it is none such."""
        if not entry.terms:
            return entry.start, []
        axes, steps = zip(*sorted(entry.terms, key=lambda term: -term[1]), strict=True)
        sizes = [self.sizes[a] for a in axes]
        if any(step != n * inner for step, n, inner in zip(steps, sizes[1:], steps[1:], strict=False)):
            return None
        last = entry.start + sum(step * (n - 1) for step, n in zip(steps, sizes, strict=True))
        return (slice(entry.start, last + 1, steps[-1]) if 0 not in sizes else slice(0, 0)), [*axes]


def _read(e: _Evaluation, _: int, n: Node):
    array, index = e.arrays[n.attr("tensor")], n.attr("index")
    inside = [i for d, i in enumerate(index) if e.graph.inside(n.attr("tensor"), d, i)]
    parts, axes = [p for p in map(e.part, inside) if p is not None], [a for i in index for a in i.axes]
    if len(parts) < len(index) or len(set(axes)) < len(axes):
        shape = tuple(e.sizes[a] for a in n.axes)
        return e.lib.take(array, tuple(e.lib.expand(e.index(i, n.args, n.axes), shape) for i in index))
    found, axes = array[tuple(at for at, _ in parts)], [a for _, own in parts for a in own]
    if any(len(own) > 1 for _, own in parts):
        found = found.reshape(tuple(e.sizes[a] for a in axes))
    return e.lib.transpose(found, tuple(axes.index(a) for a in n.axes))


def _elementwise(e: _Evaluation, _: int, n: Node):
    function = e.lib.where if n.op == "where" else e.lib.elementwise[n.op]
    return function(*(e.aligned(a, n.axes) for a in n.args))


def _reduce(e: _Evaluation, i: int, n: Node):
    axis, kind = n.attr("axis"), n.attr("kind")
    if kind != "sum" and e.sizes[axis] == 0:
        if i in e.graph.needy:
            raise ShapeError(f"{e.graph.name}: {kind} over {axis} needs at least one element, got {axis} = 0")
        return e.lib.expand(e.lib.constant(IDENTITY[kind, n.dtype], n.dtype, e.like), tuple(e.sizes[a] for a in n.axes))
    return e.lib.reduce[n.attr("kind")](e.values[n.args[0]], e.graph.nodes[n.args[0]].axes.index(n.attr("axis")))


def _contract(e: _Evaluation, _: int, n: Node):
    (left, a), (right, b) = ((e.graph.nodes[x].axes, e.values[x]) for x in n.args)
    return _product(e, left, a, right, b, n.axes)


def _product(e: _Evaluation, left: tuple[str, ...], a, right: tuple[str, ...], b, out: tuple[str, ...]):
    """The sum over what is not in `out` of a·b, which vary over `left` and `right`."""
    names = {axis: chr(97 + i) for i, axis in enumerate(e.graph.axes)}
    one, other, kept = ("".join(names[axis] for axis in axes) for axes in (left, right, out))
    return e.lib.einsum(f"{one},{other}->{kept}", a, b)


def _exp_sum(e: _Evaluation, _: int, n: Node):
    """Σ exp(score - top)·value. Where every score is -inf, so is the top, and all weights are zero."""
    scores, values, top = n.args
    axes, lib = e.graph.nodes[scores].axes, e.lib
    top = e.aligned(top, axes)
    shift = lib.where(top == -np.inf, lib.constant(0.0, "float32", e.like), top)
    weights = lib.elementwise["exp"](lib.elementwise["sub"](e.values[scores], shift))
    if n.attr("axis") not in e.graph.nodes[values].axes:
        return lib.elementwise["mul"](lib.reduce["sum"](weights, axes.index(n.attr("axis"))), e.values[values])
    weights = lib.cast(weights, n.attr("weights"), True)
    return _product(e, axes, weights, e.graph.nodes[values].axes, e.values[values], n.axes)


def _cast(e: _Evaluation, i: int, n: Node):
    return e.lib.cast(e.values[n.args[0]], n.dtype, i in e.used)


def _top_k(e: _Evaluation, _: int, n: Node):
    have, axis = e.graph.nodes[n.args[0]].axes, n.attr("axis")
    last = tuple(a for a in have if a != axis)
    keys = e.lib.transpose(e.values[n.args[0]], tuple(have.index(a) for a in (*last, axis)))
    best, ids = e.lib.top_k(keys, n.attr("k"))
    made = (*last, n.attr("into"))
    return e.lib.transpose(best if n.attr("part") == "keys" else ids, tuple(made.index(a) for a in n.axes))


def _place(e: _Evaluation, _: int, n: Node):
    """Values at their places, zeros elsewhere."""
    gone = {a for x in n.args[1:] for a in e.graph.nodes[x].axes}
    rest = [a for a in n.axes if a not in n.attr("over")]
    axes = e.graph.ordered({*gone, *rest})
    at = dict(zip(n.attr("over"), (e.aligned(x, axes) for x in n.args[1:]), strict=True))
    at |= {a: e.along(a, axes) for a in rest}
    shape = tuple(e.sizes[a] for a in axes)
    value = e.lib.expand(e.aligned(n.args[0], axes), shape)
    base = e.lib.expand(e.lib.constant(0, n.dtype, e.like), tuple(e.sizes[a] for a in n.axes))
    return e.lib.scatter(base, tuple(e.lib.expand(at[a], shape) for a in n.axes), value)


def _pick(e: _Evaluation, _: int, n: Node):
    """The elements of x at ids: differentiable, where the value unpacked from the key is not."""
    _, x, ids = n.args
    shape = tuple(e.sizes[a] for a in n.axes)
    index = (e.values[ids] if a == n.attr("axis") else e.along(a, n.axes) for a in e.graph.nodes[x].axes)
    return e.lib.take(e.values[x], tuple(e.lib.expand(at, shape) for at in index))


def _all_reduce(e: _Evaluation, _: int, n: Node):
    """The parts of all ranks, added up in float32 in the order of ranks: a gather in place of a sum that has its own order."""
    (part,) = n.args
    parts = [peer.values[part] for peer in e.all] or e.lib.parts(e.graph.name, e.values[part], n.attr("over"), n.attr("ranks"))
    total, *others = (e.lib.cast(x, "float32", True) for x in parts)
    for x in others:
        total = e.lib.elementwise["add"](total, x)
    return total


OPS: dict[str, Callable[[_Evaluation, int, Node], Any]] = {
    "all_reduce": _all_reduce,
    "read": _read,
    "reduce": _reduce,
    "contract": _contract,
    "exp_sum": _exp_sum,
    "cast": _cast,
    "top_k": _top_k,
    "pick": _pick,
    "place": _place,
    "bitcast": lambda e, i, n: e.lib.bitcast(e.values[n.args[0]], n.dtype),
    "iota": lambda e, i, n: e.index(n.attr("index"), (), n.axes),
    "const": lambda e, i, n: e.lib.constant(n.attr("value"), n.dtype, e.like),
    "extent": lambda e, i, n: e.lib.constant(e.sizes[n.attr("axis")], "int32", e.like),
    "cumsum": lambda e, i, n: e.lib.cumsum(e.values[n.args[0]], e.graph.nodes[n.args[0]].axes.index(n.attr("axis"))),
    **dict.fromkeys((*ELEMENTWISE, "where"), _elementwise),
}


def evaluate(graph: Graph, arrays: Mapping[str, Any], sizes: Mapping[str, int], library: str) -> dict[str, Any]:
    """The outputs of `graph` by name, computed with `library` ("numpy", "torch" or "jax"); nothing is written in place.

    `arrays` are the operands by name, of any strides; `sizes` gives the dynamic axes.
    """
    with np.errstate(all="ignore"):
        return _Evaluation(unrolled(graph), arrays, sizes, LIBRARIES[library]()).run()


def evaluate_ranks(graph: Graph, arrays: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The outputs of every rank of a mesh, all played by numpy in this process: `arrays` has each one's operands, in order."""
    if (ranks := set(graph.ranks.values())) - {len(arrays)}:
        raise UnavailableError(f"{graph.name}: it adds up over {max(ranks)} ranks, but there are operands of {len(arrays)}")
    graph = unrolled(graph)
    every = [_Evaluation(graph, each, sizes, LIBRARIES["numpy"]()) for each in arrays]
    with np.errstate(all="ignore"):
        for i in graph.live():
            for e in every:
                e.all = every
                e.make(i)
        return [e.written() for e in every]
