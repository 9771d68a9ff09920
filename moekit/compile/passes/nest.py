"""The first pass: Graph + Schedule + layouts → TileProgram.

Values are made where they are first needed, in the outermost scope that binds the looped axes they vary over, so what
does not depend on a loop is computed before it. A reduction over a looped axis opens a loop; all reductions over the same
axis that are equally deep share one. Outputs are stored last. Nothing is masked yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce

from moekit.compile import tile as t
from moekit.compile.passes.reductions import reduction
from moekit.compile.passes.scope import Layouts, Scope, Writer
from moekit.compile.schedule.directives import Section
from moekit.compile.schedule.facts import all_or_nothing
from moekit.compile.schedule.stores import in_order
from moekit.compile.tile.layouts import mail_name
from moekit.lang.graph import BINARY, UNARY, Graph, Index, Node, Write, below

#: Integers with a meaning, most of them of the keys that floats are ranked by (lang/ops.py).
KNOWN = {-(2**31): "LOWEST", 2**31 - 1: "HIGHEST", -(2**31) + 2**16: "NAN_KEY", -(2**31) + 1: "NAN_KEY"}
ELEMENTWISE: dict[str, tuple[Callable[..., t.Op], tuple[str, ...]]] = {
    **dict.fromkeys(UNARY, (t.Unary, ("value",))),
    **dict.fromkeys(BINARY, (t.Binary, ("left", "right"))),
    "where": (t.Where, ("condition", "yes", "no")),
    "cast": (t.Cast, ("value",)),
    "bitcast": (t.Bitcast, ("value",)),
}


class Nest(Writer):
    """One lowering of one graph; `nest` below is its only use."""

    def run(self) -> t.TileProgram:
        """The program."""
        for axis in self.program.axes:
            if axis.mode in ("grid", "whole") and axis.of is None:
                self.root.bind(axis.name)
        self._stores()
        return replace(self.program, body=tuple(self.root.ops))

    def value(self, node: int, scope: Scope) -> t.Value:
        home = self.home(self.graph.nodes[node].axes, scope)
        if node not in home.made:
            before, self.numbers.line = self.numbers.line, self.graph.lines.get(node, "")
            home.made.setdefault(node, self._make(node, self.graph.nodes[node], home))
            self.numbers.line = before
        return home.made[node]

    def _make(self, node: int, n: Node, home: Scope) -> t.Value:
        if n.op == "where" and self._certain(n.args[0], home):
            return self.value(n.args[1], home)
        if n.op in ELEMENTWISE:
            kind, fields = ELEMENTWISE[n.op]
            args = dict(zip(fields, (self.value(a, home) for a in n.args), strict=True))
            more = {"op": n.op} if kind in (t.Unary, t.Binary) else {}
            return home.emit(kind, self.graph.names.get(node, ""), n.dtype, **args, **more)
        return OTHERS[n.op](self, node, n, home)

    def _certain(self, node: int, home: Scope) -> bool:
        """Whether a condition holds wherever a loop goes that has all of its axis or nothing: that the end is not reached."""
        ended = {a: e for scope in home.chain() for a, e in scope.ended.items()}
        return any(below(self.graph.nodes, node, a) == e and all_or_nothing(self.graph, e, a) for a, e in ended.items())

    def read(self, node: int, home: Scope, instead: Mapping[int, t.Index] = {}) -> t.Value:
        n = self.graph.nodes[node]
        if n.op == "where":
            inner, (condition, _, other) = self.read(n.args[1], home, instead), n.args
            certain = self._certain(condition, home)
            return inner if certain else home.where(self.value(condition, home), inner, self.value(other, home))
        if n.op == "cast":  # of what is only stored
            return home.cast(self.read(n.args[0], home, instead), n.dtype)
        at = self._access(n.attr("tensor"), n.attr("index"), n.args, home, instead)
        return home.emit(t.Load, self.graph.names.get(node) or at.tensor, at=at)

    def _access(
        self, tensor: str, index: tuple[Index, ...], args: tuple[int, ...], scope: Scope, instead: Mapping[int, t.Index] = {}
    ) -> t.Access:
        """What a read or write of the graph is in `scope`."""

        def block(term: str | int) -> t.Value:
            return scope.elements(term) if isinstance(term, str) else self.value(args[term], scope)

        found = []
        for d, entry in enumerate(index):
            if d in instead:
                found.append(instead[d])
            elif entry.operands or self.graph.inside(tensor, d, entry):
                found.append(entry.each(block))
            else:
                found.append(t.Index.of(self.along(entry, scope)))
        return t.Access(tensor, tuple(found))

    def const(self, node: int, n: Node, home: Scope) -> t.Value:
        """A number."""
        value = n.attr("value")
        return home.const(value, n.dtype, name=KNOWN.get(value, "") if n.dtype == "int32" else "")

    def along(self, entry: Index, scope: Scope) -> t.Value:
        """An index along axes as a value, made once in its home."""
        home = self.home(entry.axes, scope)
        if entry not in home.made:
            home.made[entry] = self._along(entry, home)
        return home.made[entry]

    def _along(self, entry: Index, home: Scope) -> t.Value:
        along = [(home.elements(axis), step) for axis, step in entry.terms]
        terms = [home.binary("mul", value, home.const(step)) if step != 1 else value for value, step in along]
        if not terms:
            return home.const(entry.start)
        value = reduce(lambda a, b: home.binary("add", a, b, "index"), terms)
        sign = "sub" if entry.start < 0 else "add"
        return home.binary(sign, value, home.const(abs(entry.start))) if entry.start else value

    def scan(self, node: int, n: Node, home: Scope) -> t.Value:
        """A running sum, along a looped axis with what came before the turn; that of one element is itself."""
        value, axis, name = self.value(n.args[0], home), n.attr("axis"), self.graph.names.get(node, "running")
        held = axis in value.axes
        if axis not in self.looped or home.parent is None:
            return home.emit(t.Scan, name, value=value, axis=axis) if held else value
        begun = home.parent.const(0, n.dtype, set(value.axes) - {axis})
        before = self.numbers.like(begun, f"{name}_before")
        total = home.emit(t.Reduce, f"{name}_turn", op="sum", value=value, axis=axis) if held else value
        home.running.append((before, begun, home.binary("add", before, total)))
        return home.binary("add", before, home.emit(t.Scan, value=value, axis=axis) if held else value, name)

    def before(self, node: int, n: Node, home: Scope) -> t.Value:
        """What a turn of a loop begins with."""
        begun = self.value(n.args[0], home.parent or home)
        held = self.numbers.like(begun, self.graph.names.get(n.args[0], "held"))
        home.handed[node] = held, begun
        return held

    def after(self, node: int, n: Node, home: Scope) -> t.Value:
        """What the last turn leaves, of a loop that stores nothing on the way."""

        def body(inner: Scope, _: tuple[t.Value, ...]) -> tuple[t.Value, ...]:
            self.value(n.args[0], inner)
            return ()

        self.loop(home, n.attr("axis"), [], [], body)
        return home.made[node]

    def extent(self, node: int, n: Node, home: Scope) -> t.Value:
        """The size of an axis: a constant where it is known after all."""
        axis = self.program.axis(n.attr("axis"))
        return home.emit(t.Extent, axis=axis.name) if axis.extent is None else home.const(axis.extent)

    def top_k(self, node: int, n: Node, home: Scope) -> t.Value:
        """Keys and ids of the best; both are made at once."""
        axis, into, keys = n.attr("axis"), n.attr("into"), self.value(n.args[0], home)
        axes = self.program.blocked({*keys.axes, into} - {axis})
        outs = (self.numbers.value("int32", axes, "best_key"), self.numbers.value("int32", axes, "ids"))
        along = (home.elements(axis), home.elements(into))
        home.ops.append(t.TopK(outs, keys, *along, axis, n.attr("k"), n.attr("bits") == 16))
        for other in self.graph.live():
            m = self.graph.nodes[other]
            if m.op == "top_k" and m.args == n.args and m.attrs[:-1] == n.attrs[:-1]:
                home.made[other] = outs[m.attr("part") == "ids"]
        return home.made[node]

    def all_reduce(self, node: int, n: Node, home: Scope) -> t.Value:
        """A sum over ranks, of a value that a program has whole rows of."""
        index = tuple(t.Index.of(home.elements(a)) for a in self.graph.nodes[n.args[0]].axes)
        at, name = t.Access(mail_name(n.attr("over")), index), self.graph.names.get(node, "reduced")
        value = self.value(n.args[0], home)
        return home.emit(t.AllReduce, name, value=value, at=at, axis=n.attr("over"), ranks=n.attr("ranks"))

    def _stores(self) -> None:
        """Everything is computed first; then outputs along looped axes are stored loop by loop, then the others.

        A loop may load again what it needs, so what overwrites an operand comes last.
        """
        seen: set[int] = set()
        for w in self.graph.writes:
            for node in (w.value, *w.ids):
                self._made_before_loops(node, seen)
        for group in in_order(self.graph, self.looped):
            self._store_group(self.root, group.axes, group.writes)

    def _made_before_loops(self, node: int, seen: set[int]) -> None:
        """Make what of a node does not vary along a looped axis."""
        if node in seen:
            return
        seen.add(node)
        if self.graph.nodes[node].op == "after":
            return  # whose loop may store outputs, too
        if not self.looped & set(self.graph.nodes[node].axes):
            self.value(node, self.root)
        else:
            for arg in self.graph.nodes[node].args:
                self._made_before_loops(arg, seen)

    def _store_group(self, scope: Scope, axes: tuple[str, ...], writes: tuple[Write, ...]) -> None:
        if not axes:
            values = [(self.value(w.value, scope), self._access(w.tensor, w.index, w.ids, scope)) for w in writes]
            scope.ops += [t.Barrier()] if any(w.tensor in self.graph.elsewhere for w in writes) else []
            scope.ops.extend(t.Store(at, value) for value, at in values)
            return

        def body(inner: Scope, _: tuple[t.Value, ...]) -> tuple[t.Value, ...]:
            self._store_group(inner, axes[1:], writes)
            return ()

        self.loop(scope, axes[0], [], [], body)


OTHERS: dict[str, Callable[[Nest, int, Node, Scope], t.Value]] = {
    "read": lambda low, node, n, home: low.read(node, home),
    "const": Nest.const,
    "pick": lambda low, node, n, home: low.value(n.args[0], home),
    "iota": lambda low, node, n, home: low.along(n.attr("index"), home),
    "extent": Nest.extent,
    "cumsum": Nest.scan,
    "before": Nest.before,
    "after": Nest.after,
    "top_k": Nest.top_k,
    "all_reduce": Nest.all_reduce,
    "reduce": reduction,
    "contract": reduction,
    "exp_sum": reduction,
}


def nest(graph: Graph, section: Section, layouts: Layouts, sizes: Mapping[str, int]) -> t.TileProgram:
    """The tile program of `graph` under a legal `section`; `sizes` fixes dynamic axes where they are known (JAX)."""
    return Nest(graph, section, layouts, sizes).run()
