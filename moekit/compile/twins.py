"""Twins: two products of one left operand with two blocks of columns of one tensor, done as one product twice as wide.

A gate and an up projection are such twins. The matrix unit reads its left operand from shared memory for each product anew, and
two accumulators in a flat loop keep Triton 3.6's products from overlapping. The two halves of each column's sums are the same
numbers as before, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.naming import identifier
from moekit.compile.schedule.directives import Pair
from moekit.compile.schedule.facts import apart, twice_axis
from moekit.compile.schedule.legal import pairable
from moekit.compile.scope import Scope
from moekit.lang.graph import Along

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering


@dataclass(frozen=True)
class Twins:
    """Contractions `nodes` of node `left` with node `right` and another read that begins elsewhere in dimension `dim`."""

    nodes: tuple[int, int]
    left: int
    right: int
    dim: int
    along: tuple[Along, Along]

    @property
    def column(self) -> str:
        """The axis of the columns, of which a program holds two blocks."""
        return self.along[0].axis or ""


def paired(low: Lowering, group: list[int]) -> list[int | Twins]:
    """The reductions of a group, those together that the schedule pairs."""
    found: list[int | Twins] = list(group)
    for directive in low.schedule.all(Pair):
        both = pairable(low.graph, low.schedule, directive.tensor)
        if both and set(both) <= set(group):
            found[found.index(both[0])] = _twins(low, *both)
            found.remove(both[1])
    return found


def _twins(low: Lowering, a: int, b: int) -> Twins:
    nodes = low.graph.nodes
    (left,) = set(nodes[a].args) & set(nodes[b].args)
    right, other = (next(x for x in nodes[m].args if x != left) for m in (a, b))
    dim = apart(nodes[right], nodes[other])
    if dim is None:
        raise ValueError(f"{low.graph.name}: products {a} and {b} are no twins")
    return Twins((a, b), left, right, dim, (nodes[right].attr("index")[dim], nodes[other].attr("index")[dim]))


def accumulator_axes(low: Lowering, twins: Twins) -> tuple[str, ...]:
    """The axes of their product; the one of its columns becomes known to the program here."""
    twice, block = twice_axis(twins.column), low.blocks[twins.column].block
    low.blocks.setdefault(twice, t.AxisBlock(twice, 2 * block, 2 * block, "whole", of=twins.column))
    return low.tile_axes({twice if a == twins.column else a for a in low.graph.nodes[twins.nodes[0]].axes})


def operands(low: Lowering, twins: Twins, scope: Scope) -> list[t.Value]:
    """The left operand, and both right ones in one block."""
    right = low.read(twins.right, scope, {twins.dim: _columns(low, twins)})
    return [low.value(twins.left, scope), right]


def _columns(low: Lowering, twins: Twins) -> tuple[t.Value, t.Value | None]:
    """The index of both blocks of columns side by side, and their mask."""
    root, (i, j), twice = low.root, twins.along, twice_axis(twins.column)
    key = ("twins", i, j)
    if key not in root.made:
        name = identifier(twice)
        plain = next(op for op in root.ops if isinstance(op, t.Index) and op.axis == i.axis)
        index = low.emit(root, t.Index, name, "int32", (twice,), axis=i.axis, start=plain.start)
        mask = None
        if low.blocks[twins.column].partial:
            mask = low.emit(root, t.InBounds, f"{name}_mask", "bool", (twice,), axis=i.axis, index=index)
        if i.step != 1:
            index = low.binary(root, "mul", index, low.const(root, i.step), name)
        sides = low.emit(root, t.Sides, f"{name}_from", "int32", (twice,), axis=twice, values=(i.start, j.start))
        root.made[key] = low.binary(root, "add", index, sides, name), mask
    return root.made[key]


def halves(low: Lowering, twins: Twins, product: t.Value, home: Scope) -> list[t.Value]:
    """What each of the twins is of their product."""
    found = []
    for side, m in enumerate(twins.nodes):
        n = low.graph.nodes[m]
        hint = low.graph.names.get(m, f"sum_{identifier(n.attr('axis'))}")
        axes, twice = low.tile_axes(n.axes), twice_axis(twins.column)
        found.append(low.emit(home, t.Half, hint, product.dtype, axes, value=product, axis=twice, side=side))
    return found
