"""Where operations are written: scopes, blocks of axes, and the helpers that emit one tile operation each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moekit.compile import tile as t
from moekit.compile.naming import TEMPORARY, Names, arguments_of, identifier
from moekit.compile.schedule.directives import Section
from moekit.compile.schedule.facts import PART, axis_uses, gathered, part_axis, reduction_levels, shares
from moekit.lang.graph import COMPARE, Graph, Node


@dataclass
class Scope:
    """A straight run of operations: the program's own, or a loop's body."""

    parent: Scope | None
    bound: dict[str, tuple[t.Value, t.Value | None]] = field(default_factory=dict)
    ops: list = field(default_factory=list)
    made: dict = field(default_factory=dict)

    def chain(self) -> list[Scope]:
        """The scopes around this one, outermost first, itself last."""
        return [*(self.parent.chain() if self.parent else []), self]


class Writer:
    """The state of one lowering: how each axis is blocked, what has been emitted where, and names."""

    def __init__(
        self,
        graph: Graph,
        schedule: Section,
        layouts: Mapping[str, t.Strided | t.Viewed],
        sizes: Mapping[str, int],
    ):
        self.graph, self.schedule, self.layouts = graph, schedule, layouts
        extent = {a: sizes.get(a, s) for a, s in graph.axes.items()}
        parts = {**shares(graph), **schedule.parts}
        self.blocks = {
            a: t.AxisBlock(a, extent[a], schedule.block(a), schedule.mode(a), parts.get(a, 1)) for a in axis_uses(graph)
        }
        self.gathered = {a: t.AxisBlock(a, extent[a], 1, "gather") for a in gathered(graph) if a not in self.blocks}
        self.looped = {a for a, b in self.blocks.items() if b.mode == "loop"}
        self.grid = self._grid()
        self.level, _ = reduction_levels(graph, self.looped)
        self.names = Names(arguments_of(graph.axes, {n: x.axes for n, x in graph.tensors.items()}))
        self.root = Scope(None)
        self.zeroed: dict[str, set[str]] = {}
        self.comments: dict[str, str] = {}
        self.last_line = ""

    def _grid(self) -> tuple[str, ...]:
        """Grid axes, dynamic ones outermost: only the outermost needs no division by its number of blocks."""
        axes = [a for a, b in self.blocks.items() if b.mode == "grid"]
        return tuple(sorted(axes, key=lambda a: self.graph.axes[a] is not None))

    def bind(self, scope: Scope, axis: str, block: t.AxisBlock, start: t.Value | None = None) -> None:
        """Give `axis` its index and mask in `scope`."""
        if block.mode == "grid" and (block.block == 1 or block.extent is None or block.extent > block.block):
            start = self.emit(scope, t.ProgramId, f"pid_{identifier(axis)}", "int32", (), axis=axis)
            if block.block > 1:
                start = self.binary(scope, "mul", start, self.const(scope, block.block), f"{identifier(axis)}_start")
        axes = (axis,) if block.block > 1 else ()
        index = self.emit(scope, t.Index, identifier(axis), "int32", axes, axis=axis, start=start)
        mask = None
        if block.partial:
            mask = self.emit(scope, t.InBounds, f"{identifier(axis)}_mask", "bool", axes, axis=axis, index=index)
        scope.bound[axis] = (index, mask)

    def bound(self, scope: Scope, axis: str) -> tuple[t.Value, t.Value | None]:
        return next(s.bound[axis] for s in reversed(scope.chain()) if axis in s.bound)

    def home(self, axes, scope: Scope) -> Scope:
        """The outermost scope around `scope` that sees the same indices of the looped axes in `axes`.

        A loop inside another over the same axis hides that one's index.
        """
        chain = scope.chain()
        depths = [max(i for i, s in enumerate(chain) if a in s.bound) for a in self.looped & set(axes)]
        return chain[max(depths, default=0)]

    def tile_axes(self, axes) -> tuple[str, ...]:
        return tuple(a for a in self.blocks if a in set(axes) and self.blocks[a].block > 1)

    def emit(self, scope: Scope, kind, hint: str, dtype: str, axes, **fields) -> t.Value:
        out = t.Value(self.names.fresh(hint), dtype, tuple(axes))
        scope.ops.append(kind(out=out, **fields))
        return out

    def const(self, scope: Scope, value, dtype: str = "int32") -> t.Value:
        """A constant; one per scope chain and value."""
        key = ("const", repr(value), dtype)
        for s in scope.chain():
            if key in s.made:
                return s.made[key]
        self.root.made[key] = t.Value(self.names.fresh("c"), dtype)
        self.root.ops.append(t.Const(self.root.made[key], value))
        return self.root.made[key]

    def binary(self, scope: Scope, op: str, a: t.Value, b: t.Value, hint: str = TEMPORARY) -> t.Value:
        dtype = "bool" if op in COMPARE else a.dtype
        return self.emit(scope, t.Binary, hint, dtype, self.tile_axes((*a.axes, *b.axes)), op=op, left=a, right=b)

    def where(self, scope: Scope, condition: t.Value, yes: t.Value, no: t.Value, hint: str = TEMPORARY) -> t.Value:
        axes = self.tile_axes((*condition.axes, *yes.axes, *no.axes))
        return self.emit(scope, t.Where, hint, yes.dtype, axes, condition=condition, yes=yes, no=no)

    def all(self, scope: Scope, masks) -> t.Value | None:
        """The conjunction of masks, None for none."""
        masks = tuple(dict.fromkeys(m for m in masks if m is not None))
        if len(masks) < 2:
            return masks[0] if masks else None
        key = ("and", masks)
        if key not in scope.made:
            result = masks[0]
            for mask in masks[1:]:
                result = self.binary(scope, "and", result, mask, "mask")
            scope.made[key] = result
        return scope.made[key]

    def remask(self, scope: Scope, value: t.Value, axis: str, identity) -> t.Value:
        """`value` with lanes beyond the end of `axis` replaced by `identity`."""
        mask = self.bound(scope, axis)[1]
        if mask is None or (identity == 0 and axis in self.zeroed.get(value.name, ())):
            return value
        masked = self.where(scope, mask, value, self.const(scope, identity, value.dtype), f"{value.name}_in")
        if identity == 0:
            self.zeroed[masked.name] = {*self.zeroed.get(value.name, ()), axis}
        return masked

    def numbered(self, ids: tuple[int, ...]) -> list[tuple[int, Node]]:
        """Nodes with their numbers."""
        return [(i, self.graph.nodes[i]) for i in ids]

    def loop(self, home: Scope, axis: str, carries, inits, body: Callable[[Scope], list[t.Value]]) -> tuple[t.Value, ...]:
        """A loop over the blocks of `axis` (or of one part of it); one over parts is unrolled: all are loaded at once."""
        block = self.blocks[axis]
        scope = Scope(home)
        var = start = t.Value(self.names.fresh(f"{identifier(axis)}_start"), "int32")
        stop = block.share if block.parts > 1 else self.extent(home, axis) if block.extent is None else block.extent
        if block.parts > 1:
            start = self.binary(scope, "add", self.first(home, axis), var, f"{identifier(axis)}_at")
        self.bind(scope, axis, block, start)
        yields = tuple(body(scope))
        outs = tuple(t.Value(self.names.fresh(c.name), c.dtype, c.axes) for c in carries)
        home.ops.append(t.Loop(var, stop, block.block, carries, inits, tuple(scope.ops), yields, outs, axis.endswith(PART)))
        return outs

    def first(self, home: Scope, axis: str) -> t.Value:
        """The first element of the part of `axis` that `home` is about."""
        if ("first", axis) not in home.made:
            part, share = self.bound(home, part_axis(axis))[0], self.const(home, self.blocks[axis].share)
            home.made["first", axis] = self.binary(home, "mul", part, share, f"{identifier(axis)}_first")
        return home.made["first", axis]

    def each_part(
        self, home: Scope, axis: str, carries, inits, body: Callable[[Scope], list[t.Value]], flat: bool
    ) -> tuple[t.Value, ...]:
        """A loop over the parts of `axis`; within it a `loop` goes over the blocks of one part."""
        scope, var = Scope(home), t.Value(self.names.fresh(f"{identifier(axis)}_part"), "int32")
        scope.bound[part_axis(axis)] = (var, None)
        yields = tuple(body(scope))
        outs = tuple(t.Value(self.names.fresh(c.name), c.dtype, c.axes) for c in carries)
        parts, ops = self.blocks[axis].parts, tuple(scope.ops)
        home.ops.append(t.Loop(var, parts, 1, carries, inits, ops, yields, outs, flat=flat))
        return outs

    def extent(self, scope: Scope, axis: str) -> t.Value:
        key = ("extent", axis)
        if key not in self.root.made:
            if (size := {**self.blocks, **self.gathered}.get(axis, t.AxisBlock(axis, None, 1, "gather")).extent) is not None:
                return self.const(scope, size)
            self.root.made[key] = self.emit(self.root, t.Extent, f"{identifier(axis)}_size", "int32", (), axis=axis)
        return self.root.made[key]
