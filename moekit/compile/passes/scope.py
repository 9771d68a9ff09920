"""Where operations are written when a graph becomes a program: its frame, and the scopes of its loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.passes.sides import placed
from moekit.compile.schedule.directives import Pair, Section
from moekit.compile.schedule.facts import (
    PART,
    PRODUCTS,
    Twins,
    axis_uses,
    gathered,
    part_axis,
    read,
    reduction_levels,
    shares,
    twice_axis,
)
from moekit.compile.schedule.legal import pairable, uses_dot
from moekit.compile.tile.layouts import epochs_name, mail_name
from moekit.lang.graph import Graph, Index

STRIP = 8  # rows of a left operand between two of which a lane of the matrix unit has the sums
FEW = 16  # turns of one element each that are written out

Layouts = Mapping[str, t.Layout]


@dataclass
class Scope(t.Draft):
    """A straight run of operations: the program's own, or a loop's body.

    `bound` has the elements of axes known from here, `made` the blocks of nodes and of indices. `running`: the running sums of
    a loop, each as what came before the turn, what that begins with, what comes before the next. `handed`: by the node of what
    its turns hand on, what a turn begins with and what the first one does. `ended`: by the axis that a
    loop goes over, the node of the element where it ends. `weights`: by the node of a largest score, what a sum of exponentials
    so far is worth now, and exp(score - largest so far).
    """

    parent: Scope | None = None
    bound: dict[str, t.Value] = field(default_factory=dict)
    made: dict[int | Index, t.Value] = field(default_factory=dict)
    running: list[tuple[t.Value, t.Value, t.Value]] = field(default_factory=list)
    handed: dict[int, tuple[t.Value, t.Value]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    weights: dict[int, tuple[t.Value | None, t.Value]] = field(default_factory=dict)

    def chain(self) -> list[Scope]:
        """The scopes around this one, outermost first, itself last."""
        return [*(self.parent.chain() if self.parent else []), self]

    def bind(self, axis: str, turn: t.Value | None = None, part: t.Value | None = None) -> None:
        """Give `axis` its elements here."""
        self.bound[axis] = self.emit(t.Elements, identifier(axis), axis=axis, turn=turn, part=part)

    def elements(self, axis: str) -> t.Value:
        """The elements of an axis that are at hand."""
        return next(s.bound[axis] for s in reversed(self.chain()) if axis in s.bound)


def frame(graph: Graph, section: Section, layouts: Layouts, sizes: Mapping[str, int], pairs: Iterable[Twins]) -> t.TileProgram:
    """The program of a graph without its operations: its tensors, how it holds each axis, and its grid."""
    extent = {a: sizes.get(a, s) for a, s in graph.axes.items()}
    parts = {**shares(graph), **section.parts}
    each = {**graph.each, **section.each}
    doubled, axes = {pair.column for pair in pairs}, {}
    order, left = placed(graph, section, doubled)
    for a in order:
        block = section.block(a)
        if a in doubled:  # of a left operand a lane has rows that are so far apart
            strip = min(block, STRIP) if a in left else block
            axes[twice_axis(a)] = t.AxisBlock(twice_axis(a), 2 * block, 2 * block, "whole", of=a, strip=strip)
        axes[a] = t.AxisBlock(a, extent[a], block, section.mode(a), parts.get(a, 1), each=each.get(a, 0))
    axes |= {part_axis(a): t.AxisBlock(part_axis(a), n, 1, "loop") for a, n in section.parts.items()}
    named = {*gathered(graph), *(n.attr("axis") for n in graph.live_nodes("extent"))}
    axes |= {a: t.AxisBlock(a, extent[a], 1, "gather") for a in graph.ordered(named - set(axes))}
    params = tuple(
        t.Param(x.name, x.role, x.dtype, x.axes, layouts[x.name])
        for x in graph.tensors.values()
        if x.name in read(graph) or x.role != "In"
    )
    for n in graph.live_nodes("all_reduce"):
        value, mail, epochs = graph.nodes[n.args[0]], mail_name(n.attr("over")), epochs_name(n.attr("over"))
        params += (
            t.Param(mail, "In", value.dtype, value.axes, layouts[mail]),
            t.Param(epochs, "InOut", "int32", value.axes[:1], layouts[epochs]),
        )
    # dynamic axes outermost: only the outermost needs no division by its number of blocks
    grid = sorted((a for a in axis_uses(graph) if axes[a].mode == "grid"), key=lambda a: graph.axes[a] is not None)
    return t.TileProgram(graph.name, params, tuple(axes.values()), tuple(grid))


class Writer(ABC):
    """The state of one lowering: the program so far, and what is known of the graph."""

    def __init__(self, graph: Graph, section: Section, layouts: Layouts, sizes: Mapping[str, int]):
        self.graph, self.section = graph, section
        self.pairs = [pair for d in section.all(Pair) if (pair := pairable(graph, section, d.tensor))]
        self.program, self.numbers = frame(graph, section, layouts, sizes, self.pairs), t.Numbers()
        self.looped = {a for a in axis_uses(graph) if section.mode(a) == "loop"}
        self.level, _ = reduction_levels(graph, self.looped)
        self.root = Scope(self.program, self.numbers)

    @abstractmethod
    def value(self, node: int, scope: Scope) -> t.Value:
        """The block of a node, made in its home scope if it is not there yet."""

    @abstractmethod
    def read(self, node: int, home: Scope, instead: Mapping[int, t.Index] = {}) -> t.Value:
        """The load that a read node says, some indices replaced; behind the choices around it."""

    def is_dot(self, node: int) -> bool:
        """Whether a node is a product for the matrix unit."""
        return self.graph.nodes[node].op in PRODUCTS and uses_dot(self.graph, self.section, node)

    def home(self, axes: Iterable[str], scope: Scope) -> Scope:
        """The outermost scope around `scope` that sees the same elements of the looped axes in `axes`.

        A loop inside another over the same axis hides that one's elements.
        """
        chain = scope.chain()
        depths = [max(i for i, s in enumerate(chain) if a in s.bound) for a in self.looped & set(axes)]
        return chain[max(depths, default=0)]

    def loop(
        self,
        home: Scope,
        axis: str,
        names: list[str],
        inits: list[t.Value],
        body: Callable[[Scope, tuple[t.Value, ...]], Iterable[t.Value]],
        end: t.Value | None = None,
    ) -> tuple[t.Value, ...]:
        """A loop over the blocks of `axis`, those of one part where it has parts; what its carries, begun from `inits`, become.

        A loop over parts that another launch has made is unrolled, and one over a few elements one by one: all are loaded at
        once, where no product waits for them. `end`: the number of elements after which there is nothing more to do, where a
        program has one.
        """
        scope, block = Scope(self.program, self.numbers, parent=home), self.program.axis(axis)
        several = block.block > 1 or block.parts > 1
        turn = self.numbers.value("int32", (), f"{identifier(axis)}_start" if several else identifier(axis))
        carries = tuple(map(self.numbers.like, inits, names))
        scope.bind(axis, turn, home.elements(part_axis(axis)) if block.parts > 1 else None)
        part = axis.endswith(PART)
        few = axis.removesuffix(PART) not in self.section.parts if part else not several and 1 < (block.length or 0) <= FEW
        yields = tuple(body(scope, carries))
        handed = self.handed_on(scope)
        unroll = end is None and few and not any(isinstance(op, t.Dot) for op, _ in t.walk(scope.ops))
        on = [*scope.running, *handed.values()]
        before, begun, after = zip(*on, strict=True) if on else ((), (), ())
        carries, begins, yields = (*carries, *before), (*inits, *begun), (*yields, *after)
        outs = tuple(map(self.numbers.like, carries))
        home.ops.append(t.Loop((turn,), (axis,), carries, begins, tuple(scope.ops), yields, outs, unroll, end))
        home.made |= dict(zip(handed, outs[len(outs) - len(handed) :], strict=True))
        return outs[: len(outs) - len(before)]

    def handed_on(self, scope: Scope) -> dict[int, tuple[t.Value, t.Value, t.Value]]:
        """What the turns of a loop hand on, as `running` has it, by the node of what the last one leaves."""
        ends = {n.args[0]: (i, n.args[1]) for i in self.graph.live() if (n := self.graph.nodes[i]).op == "after"}
        found: dict[int, tuple[t.Value, t.Value, t.Value]] = {}
        while left := [node for node in scope.handed if ends[node][0] not in found]:
            end, following = ends[left[0]]
            found[end] = (*scope.handed[left[0]], self.value(following, scope))
        return found
