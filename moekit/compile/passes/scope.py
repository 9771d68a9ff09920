"""Where operations are written: scopes, blocks of axes, and the helpers that emit one tile operation each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.schedule.directives import Section
from moekit.compile.schedule.facts import PART, axis_uses, gathered, part_axis, reduction_levels, shares
from moekit.compile.schedule.legal import uses_dot
from moekit.lang.graph import COMPARE, Graph

#: Integers with a meaning, most of them of the keys that floats are ranked by (lang/ops.py).
KNOWN = {-(2**31): "LOWEST", 2**31 - 1: "HIGHEST", -(2**31) + 2**16: "NAN_KEY", -(2**31) + 1: "NAN_KEY"}


@dataclass
class Scope:
    """A straight run of operations: the program's own, or a loop's body. `bound` has the elements of axes known from here."""

    parent: Scope | None
    bound: dict[str, t.Value] = field(default_factory=dict)
    ops: list[t.Op] = field(default_factory=list)
    made: dict[Any, t.Value] = field(default_factory=dict)

    def chain(self) -> list[Scope]:
        """The scopes around this one, outermost first, itself last."""
        return [*(self.parent.chain() if self.parent else []), self]


class Writer(ABC):
    """The state of one lowering: how each axis is blocked, and what has been emitted where."""

    def __init__(self, graph: Graph, section: Section, layouts: Mapping[str, t.Strided | t.Viewed], sizes: Mapping[str, int]):
        self.graph, self.section, self.layouts = graph, section, layouts
        extent = {a: sizes.get(a, s) for a, s in graph.axes.items()}
        parts = {**shares(graph), **section.parts}
        self.blocks = {
            a: t.AxisBlock(a, extent[a], section.block(a), section.mode(a), parts.get(a, 1)) for a in axis_uses(graph)
        }
        self.looped = {a for a, b in self.blocks.items() if b.mode == "loop"}
        self.in_parts = section.parts
        self.blocks |= {part_axis(a): t.AxisBlock(part_axis(a), n, 1, "loop") for a, n in section.parts.items()}
        named = {*gathered(graph), *(graph.nodes[i].attr("axis") for i in graph.live() if graph.nodes[i].op == "extent")}
        self.gathered = {a: t.AxisBlock(a, extent[a], 1, "gather") for a in graph.ordered(named - set(self.blocks))}
        self.level, _ = reduction_levels(graph, self.looped)
        self.numbers = t.Numbers()
        self.root = Scope(None)
        self.line = ""

    @abstractmethod
    def value(self, node: int, scope: Scope) -> t.Value:
        """The block of a node, made in its home scope if it is not there yet."""

    @abstractmethod
    def read(self, node: int, home: Scope, instead: Mapping[int, t.At] = {}) -> t.Value:
        """The load that a read node says, some indices replaced."""

    def is_dot(self, node: int) -> bool:
        """Whether a node is a product for the matrix unit."""
        return self.graph.nodes[node].op == "contract" and uses_dot(self.graph, self.section, node)

    def home(self, axes: Iterable[str], scope: Scope) -> Scope:
        """The outermost scope around `scope` that sees the same elements of the looped axes in `axes`.

        A loop inside another over the same axis hides that one's elements.
        """
        chain = scope.chain()
        depths = [max(i for i, s in enumerate(chain) if a in s.bound) for a in self.looped & set(axes)]
        return chain[max(depths, default=0)]

    def tile_axes(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of `axes` that a block has a dimension for, in the program's order."""
        return tuple(a for a in self.blocks if a in set(axes) and self.blocks[a].block > 1)

    def emit(self, scope: Scope, kind: Callable[..., t.Op], dtype: str, axes: Iterable[str], name: str = "", **fields):
        """Write an operation; its result."""
        out = self.numbers.value(dtype, axes, name, self.line)
        scope.ops.append(kind(out=out, **fields))
        return out

    def const(self, value: bool | int | float, dtype: str = "int32") -> t.Value:
        """A constant, one of each."""
        key = ("const", repr(value), dtype)
        if key not in self.root.made:
            self.root.made[key] = self.numbers.value(dtype, (), KNOWN.get(int(value), "") if dtype == "int32" else "")
            self.root.ops.append(t.Const(self.root.made[key], value))
        return self.root.made[key]

    def binary(self, scope: Scope, op: str, a: t.Value, b: t.Value, name: str = "") -> t.Value:
        """An element-wise operation of two blocks."""
        dtype = "bool" if op in COMPARE else a.dtype
        return self.emit(scope, t.Binary, dtype, self.tile_axes((*a.axes, *b.axes)), name, op=op, left=a, right=b)

    def bind(self, scope: Scope, axis: str, turn: t.Value | None = None, part: t.Value | None = None) -> None:
        """Give `axis` its elements in `scope`."""
        axes = (axis,) if self.blocks[axis].block > 1 else ()
        scope.bound[axis] = self.emit(scope, t.Elements, "int32", axes, identifier(axis), axis=axis, turn=turn, part=part)

    def elements(self, scope: Scope, axis: str) -> t.Value:
        """The elements of an axis that are at hand in `scope`."""
        return next(s.bound[axis] for s in reversed(scope.chain()) if axis in s.bound)

    def loop(
        self, home: Scope, axis: str, carries: list[t.Value], inits: list[t.Value], body: Callable[[Scope], list[t.Value]]
    ) -> tuple[t.Value, ...]:
        """A loop over the blocks of `axis`, those of one part where it has parts; its results.

        A loop over parts that another launch has made is unrolled: all are loaded at once.
        """
        scope, block = Scope(home), self.blocks[axis]
        several = block.block > 1 or block.parts > 1
        turn = self.numbers.value("int32", (), f"{identifier(axis)}_start" if several else identifier(axis))
        if part_axis(axis) in self.blocks and block.parts > 1:
            self.bind(scope, axis, turn, self.elements(scope, part_axis(axis)))
        else:
            self.bind(scope, axis, turn)
        unroll = axis.endswith(PART) and axis.removesuffix(PART) not in self.in_parts
        yields = tuple(body(scope))
        outs = tuple(map(self.numbers.like, carries))
        home.ops.append(t.Loop((turn,), (axis,), tuple(carries), tuple(inits), tuple(scope.ops), yields, outs, unroll))
        return outs
