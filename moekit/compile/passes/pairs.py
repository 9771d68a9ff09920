"""Pairs: two products of one left operand with two blocks of columns of one tensor, done as one product twice as wide.

A gate and an up projection are such a pair. The matrix unit reads its left operand from shared memory for each product anew,
and two accumulators in a loop without gaps keep Triton 3.6's products from overlapping. The two halves of each column's sums
are the same numbers as apart, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.passes.scope import Scope, Writer
from moekit.compile.schedule.directives import Pair
from moekit.compile.schedule.facts import apart, twice_axis
from moekit.compile.schedule.legal import pairable
from moekit.lang.graph import Along


@dataclass(frozen=True)
class Twins:
    """Contractions `nodes` of node `left` with node `right`, and with another read that begins elsewhere in dimension `dim`."""

    nodes: tuple[int, int]
    left: int
    right: int
    dim: int
    first: Along
    second: Along

    @property
    def column(self) -> str:
        """The axis of the columns, of which a program holds two blocks."""
        return self.first.axis or ""


def paired(low: Writer, group: list[int]) -> list[int | Twins]:
    """The reductions of a group, those together that the schedule pairs."""
    found: list[int | Twins] = list(group)
    for directive in low.section.all(Pair):
        both = pairable(low.graph, low.section, directive.tensor)
        if both and set(both) <= set(group):
            found[found.index(both[0])] = _twins(low, *both)
            found.remove(both[1])
    return found


def _twins(low: Writer, a: int, b: int) -> Twins:
    nodes = low.graph.nodes
    (left,) = set(nodes[a].args) & set(nodes[b].args)
    right, other = (next(x for x in nodes[m].args if x != left) for m in (a, b))
    dim = apart(nodes[right], nodes[other])
    if dim is None:
        raise ValueError(f"{low.graph.name}: products {a} and {b} are no pair")
    return Twins((a, b), left, right, dim, nodes[right].attr("index")[dim], nodes[other].attr("index")[dim])


def accumulator_axes(low: Writer, pair: Twins) -> tuple[str, ...]:
    """The axes of their product; the one of its columns becomes known to the program here."""
    twice, block = twice_axis(pair.column), low.blocks[pair.column].block
    low.blocks.setdefault(twice, t.AxisBlock(twice, 2 * block, 2 * block, "whole", of=pair.column))
    return low.tile_axes({twice if a == pair.column else a for a in low.graph.nodes[pair.nodes[0]].axes})


def operands(low: Writer, pair: Twins, scope: Scope) -> list[t.Value]:
    """The left operand, and both right ones in one block."""
    twice = twice_axis(pair.column)
    if twice not in low.root.bound:
        low.bind(low.root, twice)
    start, side = pair.first.start, pair.second.start - pair.first.start
    columns = t.At(low.root.bound[twice], start, pair.first.step, side)
    return [low.value(pair.left, scope), low.read(pair.right, scope, {pair.dim: columns})]


def halves(low: Writer, pair: Twins, product: t.Value, home: Scope) -> list[t.Value]:
    """What each of the two is of their product."""
    outs = []
    for m in pair.nodes:
        n = low.graph.nodes[m]
        name = low.graph.names.get(m, f"sum_{identifier(n.attr('axis'))}")
        outs.append(low.numbers.value(product.dtype, low.tile_axes(n.axes), name, low.graph.lines.get(m, "")))
    home.ops.append(t.Halves((outs[0], outs[1]), product, twice_axis(pair.column)))
    return outs
