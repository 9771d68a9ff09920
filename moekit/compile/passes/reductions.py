"""Reductions and contractions: whole in one block, or accumulated in a loop that equally deep ones share."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.passes.pairs import Twins, accumulator_axes, halves, operands, paired
from moekit.compile.passes.scope import Scope, Writer
from moekit.compile.schedule.facts import part_axis
from moekit.compile.tile.facts import COMBINE, IDENTITY
from moekit.lang.graph import Node

Unit = int | Twins


def reduction(low: Writer, node: int, n: Node, home: Scope) -> t.Value:
    """The block of a reduction or contraction."""
    axis = n.attr("axis")
    if axis in low.looped:
        return _in_loops(low, node, n, home)
    if low.is_dot(node):
        left, right = (low.value(a, home) for a in n.args)
        return _dot(low, home, axis, left, right, None, low.graph.names.get(node, "acc"))
    return _reduce(low, node, home, _operand(low, n, home), axis)


def _reduce(low: Writer, node: int, scope: Scope, value: t.Value, axis: str) -> t.Value:
    """What is left along `axis` brought together; nothing to do where a block has one element of it."""
    if axis not in value.axes:
        return value
    axes, kind = (a for a in value.axes if a != axis), _kind(low.graph.nodes[node])
    low.line = low.graph.lines.get(node, "")
    return low.emit(scope, t.Reduce, value.dtype, axes, _name(low, node), op=kind, value=value, axis=axis)


def _operand(low: Writer, n: Node, scope: Scope) -> t.Value:
    """What a reduction adds up: the operand, or the product of a contraction's operands in float32."""
    args = [low.value(a, scope) for a in n.args]
    if n.op == "reduce":
        return args[0]
    left, right = (v if v.dtype == "float32" else low.emit(scope, t.Cast, "float32", v.axes, value=v) for v in args)
    return low.binary(scope, "mul", left, right)


def _dot(low: Writer, scope: Scope, axis: str, left: t.Value, right: t.Value, acc: t.Value | None, name: str) -> t.Value:
    axes = low.tile_axes({*left.axes, *right.axes} - {axis})
    if axes[0] in right.axes:
        left, right = right, left
    return low.emit(scope, t.Dot, "float32", axes, name, left=left, right=right, axis=axis, acc=acc)


def _in_loops(low: Writer, node: int, n: Node, home: Scope) -> t.Value:
    """Open one loop for this reduction and for all that are as deep, over the same axis and in the same scope."""
    axis = n.attr("axis")
    group = [m for m in low.graph.live() if _shares_loop(low, m, node, axis) and m not in home.made]
    units = paired(low, group)
    made = _in_parts(low, units, axis, home) if axis in low.in_parts else _looped(low, units, axis, home)
    for unit, value in zip(units, made, strict=True):
        if isinstance(unit, Twins):
            home.made |= dict(zip(unit.nodes, halves(low, unit, value, home), strict=True))
        else:
            home.made[unit] = value
    return home.made[node]


def _in_parts(low: Writer, units: list[Unit], axis: str, home: Scope) -> list[t.Value]:
    """Reductions part by part, the parts' results added up in the order in which a split's second launch adds them."""
    names = [f"{_name(low, unit)}_total" for unit in units]
    axes = [accumulator_axes(low, u) if isinstance(u, Twins) else low.tile_axes(_node(low, u).axes) for u in units]
    carries, inits = _carried(low, home, units, axes, names)

    def body(scope: Scope) -> list[t.Value]:
        done = zip(units, carries, _looped(low, units, axis, scope), strict=True)
        return [low.binary(scope, COMBINE[_kind(_node(low, u))], total, value, total.name) for u, total, value in done]

    return list(low.loop(home, part_axis(axis), carries, inits, body))


def _looped(low: Writer, units: list[Unit], axis: str, home: Scope) -> list[t.Value]:
    """One loop over the blocks of `axis`, and what it leaves of each reduction brought together."""
    names = [f"{_name(low, unit)}_acc" for unit in units]
    carries, inits = _carried(low, home, units, [_axes(low, unit) for unit in units], names)

    def body(scope: Scope) -> list[t.Value]:
        return [_turn(low, unit, axis, scope, carry) for unit, carry in zip(units, carries, strict=True)]

    outs = low.loop(home, axis, carries, inits, body)
    return [_reduce(low, _first(unit), home, out, axis) for unit, out in zip(units, outs, strict=True)]


def _carried(low: Writer, home: Scope, units: list[Unit], axes: list, names: list[str]) -> tuple[list[t.Value], list[t.Value]]:
    """The accumulators of some reductions and what they begin from."""
    carries, inits = [], []
    for unit, block, name in zip(units, axes, names, strict=True):
        n = _node(low, unit)
        inits.append(low.emit(home, t.Const, n.dtype, block, value=IDENTITY[_kind(n), n.dtype]))
        carries.append(low.numbers.value(n.dtype, block, name))
    return carries, inits


def _turn(low: Writer, unit: Unit, axis: str, scope: Scope, carry: t.Value) -> t.Value:
    """One turn of a reduction."""
    n = _node(low, unit)
    low.line = low.graph.lines.get(_first(unit), "")
    if isinstance(unit, Twins) or low.is_dot(unit):
        left, right = operands(low, unit, scope) if isinstance(unit, Twins) else (low.value(a, scope) for a in n.args)
        return _dot(low, scope, axis, left, right, carry, carry.name)
    value = _operand(low, n, scope)
    return low.emit(scope, t.Accumulate, n.dtype, carry.axes, carry.name, op=_kind(n), acc=carry, value=value, axis=axis)


def _axes(low: Writer, unit: Unit) -> tuple[str, ...]:
    """The axes of a unit's accumulator: those of its result for a product, of what is added up for a sum."""
    if isinstance(unit, Twins):
        return accumulator_axes(low, unit)
    n = low.graph.nodes[unit]
    return low.tile_axes(n.axes if low.is_dot(unit) else {a for arg in n.args for a in low.graph.nodes[arg].axes})


def _first(unit: Unit) -> int:
    return unit.nodes[0] if isinstance(unit, Twins) else unit


def _node(low: Writer, unit: Unit) -> Node:
    """A reduction of a unit: those of a pair are alike."""
    return low.graph.nodes[_first(unit)]


def _name(low: Writer, unit: Unit) -> str:
    """What the result of a unit is called."""
    names = [low.graph.names.get(m) for m in (unit.nodes if isinstance(unit, Twins) else (unit,))]
    n = _node(low, unit)
    return "_".join(filter(None, names)) or f"{_kind(n)}_{identifier(n.attr('axis'))}"


def _shares_loop(low: Writer, other: int, node: int, axis: str) -> bool:
    a, b = low.graph.nodes[other], low.graph.nodes[node]
    if a.op not in ("reduce", "contract") or a.attr("axis") != axis or low.level[other] != low.level[node]:
        return False
    return low.looped & set(a.axes) == low.looped & set(b.axes)


def _kind(n: Node) -> str:
    return "sum" if n.op == "contract" else n.attr("kind")
