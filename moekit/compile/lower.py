"""Graph + Schedule + layouts → TileProgram.

Values are made where they are first needed, in the outermost scope that binds the looped axes they vary over, so what
does not depend on a loop is computed before it. A reduction over a looped axis opens a loop; all reductions over the same
axis that are equally deep share one. Outputs are stored last.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moekit.compile import tile as t
from moekit.compile.early import early_memory, memory_ops
from moekit.compile.elementwise import RULES
from moekit.compile.naming import TEMPORARY
from moekit.compile.prefetch import prefetch
from moekit.compile.reductions import reduction
from moekit.compile.schedule.directives import Section
from moekit.compile.scope import Scope, Writer
from moekit.compile.stores import in_order
from moekit.compile.topk import top_k
from moekit.lang.graph import Along, Graph, Node, Write

Instead = Mapping[int, tuple[t.Value, t.Value | None]]
NOTHING: Instead = MappingProxyType({})


class Lowering(Writer):
    """One lowering of one graph; `lower` below is its only use."""

    def run(self, digest: str, warps: int, stages: int) -> t.TileProgram:
        """The program."""
        for axis, block in self.blocks.items():
            if block.mode != "loop":
                self.bind(self.root, axis, block)
        prefetch(self)
        self._stores()
        used = {op.tensor for op in memory_ops(self.root.ops)}
        params = tuple(
            t.Param(x.name, x.role, x.dtype, x.axes, self.layouts[x.name])
            for x in self.graph.tensors.values()
            if x.name in used or x.role != "In"
        )
        axes = (*self.blocks.values(), *self.gathered.values())
        return t.TileProgram(
            self.graph.name,
            params,
            axes,
            self.grid,
            tuple(early_memory(self.root.ops, {a.name: a.block for a in axes})),
            warps,
            stages,
            digest,
            self.comments,
        )

    def value(self, node: int, scope: Scope) -> t.Value:
        """The block of a node, made in its home scope if it is not there yet."""
        home = self.home(self.graph.nodes[node].axes, scope)
        if node not in home.made:
            made = self._make(node, self.graph.nodes[node], home)
            home.made.setdefault(node, made)
        return home.made[node]

    def _make(self, node: int, n: Node, home: Scope) -> t.Value:
        if n.op in RULES:
            args = [self.value(a, home) for a in n.args]
            before = len(home.ops)
            out = RULES[n.op](self, n, home, args, self.graph.names.get(node))
            self._comment(node, home.ops[before:])
            return out
        if n.op == "read":
            return self.read(node, home)
        if n.op == "pick":
            return self.value(n.args[0], home)
        if n.op == "top_k":
            return top_k(self, node, n, home)
        return reduction(self, node, n, home)

    def _comment(self, node: int, ops: list) -> None:
        line = self.graph.lines.get(node, "")
        if ops and line and line != self.last_line and hasattr(ops[0], "out"):
            self.comments[ops[0].out.name] = self.last_line = line

    def read(self, node: int, home: Scope, instead: Instead = NOTHING) -> t.Value:
        """Load what a read node says; `instead`: other indices and masks for some dimensions."""
        n = self.graph.nodes[node]
        tensor = n.attr("tensor")
        index, wide, mask = self._address(tensor, n.attr("index"), n.args, home, instead)
        hint = self.graph.names.get(node) or tensor
        before = len(home.ops)
        replaced = {n.attr("index")[d].axis for d in instead}
        out = self.emit(
            home,
            t.Load,
            hint,
            n.dtype,
            self.tile_axes({*n.axes, *(a for v, _ in instead.values() for a in v.axes)} - replaced),
            tensor=tensor,
            index=index,
            wide=wide,
            mask=mask,
        )
        self._comment(node, home.ops[before:])
        self.zeroed[out.name] = {a for a in n.axes if a not in replaced and self.bound(home, a)[1] is not None}
        return out

    def _address(self, tensor: str, index, args, scope: Scope, instead: Instead = NOTHING):
        """Index values, their widths and the mask of a read or write."""
        dims = self.graph.tensors[tensor].dims
        values, wide, masks = [], [], []
        layout = self.layouts[tensor]
        everywhere = isinstance(layout, t.Strided) and layout.wide
        for d, (dim, entry) in enumerate(zip(dims, index, strict=True)):
            if d in instead:
                values.append(instead[d][0])
                masks.append(instead[d][1])
                dynamic = self.graph.axes[entry.axis] is None
            elif isinstance(entry, Along):
                values.append(self.along(scope, entry) if entry.axis or entry.start else None)
                masks += [self.bound(scope, entry.axis)[1]] if entry.axis else []
                dynamic = entry.axis is not None and self.graph.axes[entry.axis] is None
            else:
                ids = self.value(args[entry.operand], scope)
                values.append(ids)
                masks += [self.bound(scope, a)[1] for a in self.graph.nodes[args[entry.operand]].axes]
                masks.append(self._in_range(scope, ids, dim.axis))
                dynamic = self.graph.axes[dim.axis] is None
            wide.append(isinstance(layout, t.Strided) and (everywhere or dynamic))
        return tuple(values), tuple(wide), self.all(scope, masks)

    def along(self, scope: Scope, entry: Along) -> t.Value:
        """start + step · (index of the axis); the constant `start` where there is no axis."""
        if entry.axis is None:
            return self.const(scope, entry.start)
        index, _ = self.bound(scope, entry.axis)
        home = self.home((entry.axis,), scope)
        key = ("along", entry)
        if key not in home.made:
            if entry.step != 1:
                index = self.binary(home, "mul", index, self.const(home, entry.step), index.name)
            if entry.start:
                index = self.binary(home, "add", index, self.const(home, entry.start), index.name)
            home.made[key] = index
        return home.made[key]

    def _in_range(self, scope: Scope, ids: t.Value, axis: str) -> t.Value:
        key = ("range", ids, axis)
        if key not in scope.made:
            low = self.binary(scope, "ge", ids, self.const(scope, 0, ids.dtype))
            high = self.emit(scope, t.InBounds, TEMPORARY, "bool", ids.axes, axis=axis, index=ids)
            scope.made[key] = self.binary(scope, "and", low, high, f"{ids.name}_valid")
        return scope.made[key]

    def _stores(self) -> None:
        """Everything is computed first; then outputs along looped axes are stored loop by loop, then the others.

        A loop may load again what it needs, so what overwrites an operand comes last.
        """
        for w in self.graph.writes:
            for node in (w.value, *w.ids):
                self._prefetch(node, set())
        for group in in_order(self.graph, self.looped):
            self._store_group(self.root, group.axes, group.writes)

    def _prefetch(self, node: int, seen: set[int]) -> None:
        if node in seen:
            return
        seen.add(node)
        n = self.graph.nodes[node]
        if not self.looped & set(n.axes):
            self.value(node, self.root)
        else:
            for arg in n.args:
                self._prefetch(arg, seen)

    def _store_group(self, scope: Scope, axes: tuple[str, ...], writes: tuple[Write, ...]) -> None:
        if not axes:
            stores = []
            for w in writes:
                value = self.value(w.value, scope)
                index, wide, mask = self._address(w.tensor, w.index, w.ids, scope)
                stores.append(t.Store(w.tensor, index, wide, value, mask))
            scope.ops.extend(stores)
            return

        def body(inner: Scope) -> list[t.Value]:
            self._store_group(inner, axes[1:], writes)
            return []

        self.loop(scope, axes[0], (), (), body)


def lower(
    graph: Graph,
    section: Section,
    layouts: Mapping[str, t.Strided | t.Viewed],
    sizes: Mapping[str, int] | None = None,
    digest: str = "",
    warps: int = 4,
    stages: int = 2,
) -> t.TileProgram:
    """The tile program of `graph` under a legal `section`; `sizes` fixes dynamic axes where they are known (JAX)."""
    return Lowering(graph, section, layouts, sizes or {}).run(digest, warps, stages)
