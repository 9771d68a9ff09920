"""What is handed on from one element of an axis to the next, and a Graph without it: every element's nodes for themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from moekit.errors import DeclarationError
from moekit.lang.graph import Graph, Index, Node, made_of
from moekit.lang.ops import traced
from moekit.lang.reindex import visit
from moekit.lang.trace import Builder, Value, constant, convert, tracing


def in_turns(step: Callable[[Value], tuple[Any, Value]], begin: Value, over: str) -> tuple[Any, Value]:
    """One element of axis `over` after the other, of static size, each of which begins with what the one before left.

    `step` is called once, with what an element begins with, of the axes of `begin` and `over`; it returns what comes of the
    element, which varies along `over`, and what the next one begins with. Returned are the first, and what the last one leaves:
    `begin` where there are no elements. Nothing may be added up along `over` on the way.
    """
    builder = traced(begin, "in_turns").builder
    if builder.axis_size(over) is None:
        raise DeclarationError(f"{builder.name}: in_turns over the dynamic axis {over!r}; its size must be static")
    if over in begin.axes:
        raise DeclarationError(f"{builder.name}: in_turns over {over!r} begins with a value that varies over {over!r}")
    before = (builder.nodes[i] for i in made_of(builder.nodes, begin.node))
    if any(n.op == "after" and n.attr("axis") == over for n in before):
        raise DeclarationError(f"{builder.name}: in_turns over {over!r} begins with what other turns over {over!r} left")
    attrs = (("axis", over), ("number", sum(n.op == "before" for n in builder.nodes)))
    held = builder.add("before", (begin.node,), attrs, begin.dtype)
    given, left = step(held)
    for n in builder.nodes[held.node + 1 :]:
        own = [a for a in n.args if over in builder.nodes[a].axes] if dict(n.attrs).get("axis") == over else []
        if held.node in made_of(builder.nodes, *own):
            raise DeclarationError(f"{builder.name}: in_turns over {over!r} has a {n.op} along {over!r} of what it hands on")
    left = convert(traced(left, "in_turns"), begin.dtype)
    if {*left.axes, over} != set(held.axes):
        raise DeclarationError(
            f"{builder.name}: in_turns over {over!r} begins with a value that varies over {begin.axes} and hands on one that "
            f"varies over {tuple(a for a in left.axes if a != over)}; these must be the same"
        )
    return given, builder.add("after", (held.node, left.node), (("axis", over),), begin.dtype)


def unrolled(graph: Graph) -> Graph:
    """The same graph where nothing is handed on: each element's nodes are made of those of the one before."""
    if not any(graph.live_nodes("after")):
        return graph
    builder = Builder(graph.name, graph.axes, mesh=graph.ranks)
    with tracing(builder):
        at = partial(_Copy(graph, builder).outside, axis="")
        writes = tuple(replace(w, value=at(w.value), ids=tuple(map(at, w.ids))) for w in graph.writes)
    return replace(graph, nodes=tuple(builder.nodes), writes=writes, names={}, lines={})


class _Copy:
    """A graph's nodes in a builder, those that vary from turn to turn once for each; `within`: along which axis these do."""

    def __init__(self, graph: Graph, builder: Builder):
        self.graph, self.builder = graph, builder
        self.made: dict[int, int] = {}
        self.within: dict[int, str] = {}
        self.turns: dict[str, list[dict[int, int]]] = {}
        for i in graph.live():
            self.made[i] = self._copied(i, graph.nodes[i])

    def _copied(self, i: int, n: Node) -> int:
        if n.op == "after":
            return self._begun(n.attr("axis"))[-1][self.made[n.args[0]]]
        own = [n.attr("axis")] if n.op == "before" else [self.within[a] for a in n.args if self.within.get(a) in n.axes]
        axis = own[0] if own else ""
        if axis and self.graph.axes[axis]:
            self.within[i] = axis
        elif n.op == "before":  # of no turns
            return self.outside(n.args[0], "")
        return self.builder.add(n.op, [self.outside(a, axis) for a in n.args], n.attrs, n.dtype).node

    def outside(self, i: int, axis: str) -> int:
        """The copy of a node for one that is made in turns along `axis`, or in none: what is made in turns has each its own."""
        own = self.within.get(i, axis)
        if own == axis:
            return self.made[i]
        each = [self._at(i, own, m, done) for m, done in enumerate(self._begun(own)[:-1])]
        along, found = self.builder.add("iota", (), (("index", Index.of(own)),), "int32").node, each[-1]
        for m, value in enumerate(each):
            chosen = self.builder.add("eq", (along, constant(m, "int32").node), (), "bool").node
            found = self.builder.add("where", (chosen, value, found), (), self.graph.nodes[i].dtype).node
        return found

    def _begun(self, axis: str) -> list[dict[int, int]]:
        """By turn along an axis, and once more behind the last, what is known of it: first what it begins with."""
        if axis not in self.turns:
            ends = [n for n in self.graph.live_nodes("after") if n.attr("axis") == axis]
            begins = {self.made[n.args[0]]: self.outside(self.graph.nodes[n.args[0]].args[0], "") for n in ends}
            self.turns[axis] = [begins]
            for m in range(self.graph.axes[axis] or 0):
                done = self.turns[axis][m]
                self.turns[axis].append({self.made[n.args[0]]: self._at(n.args[1], axis, m, done) for n in ends})
        return self.turns[axis]

    def _at(self, i: int, axis: str, turn: int, done: dict[int, int]) -> int:
        """The copy of a node in one turn."""
        return visit(self.builder, self.made[i], axis, Index(start=turn), done)
