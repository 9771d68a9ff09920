"""Twins: two products of one left operand with two blocks of columns of one tensor, done as one product twice as wide.

A gate and an up projection are such twins. The matrix unit reads its left operand from shared memory for each product anew, and
two accumulators in a flat loop keep Triton 3.6's products from overlapping. Measured on an H200, a gate GEMM with its epilogue
(2048 → 1537, bfloat16, T = 16384): 173 µs, with two products of half the width 194. The two halves of each column's sums are
the same numbers as before, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.analysis import twice_axis
from moekit.compile.naming import identifier
from moekit.compile.schedule import uses_dot
from moekit.compile.scope import Scope
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Along, Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering

LEAST_ROWS = 64  # from here on the matrix unit of compute capability 9.0 takes its left operand from shared memory


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
    """The reductions of a group, twins together."""
    found: list[int | Twins] = []
    left = list(group)
    while left:
        first = left.pop(0)
        twins = next((pair for other in left if (pair := _twins(low, first, other))), None)
        found.append(twins or first)
        if twins:
            left.remove(twins.nodes[1])
    return found


def _twins(low: Lowering, a: int, b: int) -> Twins | None:
    """Two contractions as twins, None if they are none."""
    nodes, schedule = low.graph.nodes, low.schedule
    if not all(nodes[m].op == "contract" and uses_dot(low.graph, schedule, m) for m in (a, b)):
        return None
    shared = next((x for x in nodes[a].args if x in nodes[b].args), None)
    if shared is None or nodes[a].attr("axis") != nodes[b].attr("axis"):
        return None
    right, other = (next((x for x in nodes[m].args if x != shared), shared) for m in (a, b))
    dim = _apart(nodes[right], nodes[other])
    if dim is None:
        return None
    i, j = nodes[right].attr("index")[dim], nodes[other].attr("index")[dim]
    rows = [low.blocks[r].block for r in nodes[shared].axes if r not in nodes[right].axes]
    fits = i.axis not in low.looped and i.axis not in nodes[shared].axes and low.blocks[i.axis].block > 1
    fits = fits and itemsize(nodes[shared].dtype) == 2
    return Twins((a, b), shared, right, dim, (i, j)) if fits and max(rows, default=1) >= LEAST_ROWS else None


def _apart(one: Node, other: Node) -> int | None:
    """The one dimension in which two reads of a tensor are along the same axis from different elements on."""
    if one.op != "read" or other.op != "read" or one.attr("tensor") != other.attr("tensor") or one.args != other.args:
        return None
    pairs = list(zip(one.attr("index"), other.attr("index"), strict=True))
    differ = [d for d, (i, j) in enumerate(pairs) if i != j]
    if len(differ) != 1 or not all(isinstance(i, Along) for i in pairs[differ[0]]):
        return None
    i, j = pairs[differ[0]]
    return differ[0] if i.axis and (i.axis, i.step) == (j.axis, j.step) else None


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
