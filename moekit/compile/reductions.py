"""Reductions and contractions: whole in one block, or accumulated in a loop that equally deep ones share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.naming import identifier
from moekit.compile.schedule.legal import uses_dot
from moekit.compile.scope import Scope
from moekit.compile.twins import Twins, accumulator_axes, halves, operands, paired
from moekit.lang.graph import Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering

IDENTITY = {
    ("sum", "float32"): 0.0,
    ("max", "float32"): float("-inf"),
    ("min", "float32"): float("inf"),
    ("sum", "int32"): 0,
    ("max", "int32"): -(2**31),
    ("min", "int32"): 2**31 - 1,
    ("sum", "int64"): 0,
    ("max", "int64"): -(2**63),
    ("min", "int64"): 2**63 - 1,
}
Unit = int | Twins
COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


def reduction(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    axis = n.attr("axis")
    if axis in low.looped:
        return _loop_reductions(low, node, n, home)
    if n.op == "contract" and uses_dot(low.graph, low.schedule, node):
        return _dot(low, axis, [low.value(a, home) for a in n.args], home, None)
    value = _reducible(low, n, home)
    kind = _kind(n)
    value = low.remask(home, value, axis, IDENTITY[kind, value.dtype])
    return reduce(low, node, home, kind, value, axis)


def reduce(low: Lowering, node: int, scope: Scope, kind: str, value: t.Value, axis: str) -> t.Value:
    if axis not in value.axes:
        return value
    axes = tuple(a for a in value.axes if a != axis)
    hint = low.graph.names.get(node, f"{kind}_{identifier(axis)}")
    return low.emit(scope, t.Reduce, hint, value.dtype, axes, op=kind, value=value, axis=axis)


def _reducible(low: Lowering, n: Node, scope: Scope) -> t.Value:
    """What a reduction adds up: the operand, or the product of a contraction's operands in float32."""
    args = [low.value(a, scope) for a in n.args]
    if n.op == "reduce":
        return args[0]
    left, right = (_f32(low, scope, a) for a in args)
    return low.binary(scope, "mul", left, right, "product")


def _f32(low: Lowering, scope: Scope, value: t.Value) -> t.Value:
    if value.dtype == "float32":
        return value
    out = low.emit(scope, t.Cast, f"{value.name}_f32", "float32", value.axes, value=value)
    low.zeroed[out.name] = low.zeroed.get(value.name, set())
    return out


def _dot(low: Lowering, axis: str, operands: list[t.Value], scope: Scope, acc: t.Value | None) -> t.Value:
    left, right = (low.remask(scope, v, axis, 0) for v in operands)
    axes = low.tile_axes((set(left.axes) | set(right.axes)) - {axis})
    if axes[0] in right.axes:
        left, right = right, left
    return low.emit(scope, t.Dot, "acc", "float32", axes, left=left, right=right, axis=axis, acc=acc)


def _loop_reductions(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    """Open one loop for this reduction and for all that are as deep, over the same axis and in the same scope."""
    axis = n.attr("axis")
    group = [m for m in low.graph.live() if _shares_loop(low, m, node, axis) and m not in home.made]
    units = paired(low, group)
    results = _in_parts(low, units, axis, home) if axis in low.schedule.parts else _looped(low, units, axis, home)
    for unit, result in zip(units, results, strict=True):
        both = halves(low, unit, result, home) if isinstance(unit, Twins) else [result]
        home.made |= dict(zip(unit.nodes if isinstance(unit, Twins) else (unit,), both, strict=True))
    return home.made[node]


def _in_parts(low: Lowering, units: list[Unit], axis: str, home: Scope) -> list[t.Value]:
    """Reductions part by part, the parts' results added up in the order in which a split's second launch adds them.

    A single product goes from part to part without a gap; several would not overlap then (Triton 3.6 waits for each of them).
    """
    carries, inits = [], []
    for unit in units:
        hint, n = _hint(low, unit, axis), _node(low, unit)
        axes = accumulator_axes(low, unit) if isinstance(unit, Twins) else low.tile_axes(n.axes)
        inits.append(low.emit(home, t.Full, f"{hint}_init", n.dtype, axes, value=IDENTITY[_kind(n), n.dtype]))
        carries.append(t.Value(low.names.fresh(f"{hint}_total"), n.dtype, axes))

    def body(scope: Scope) -> list[t.Value]:
        done = zip(units, carries, _looped(low, units, axis, scope), strict=True)
        return [low.binary(scope, COMBINE[_kind(_node(low, u))], total, value, total.name) for u, total, value in done]

    flat = len(units) == 1 and _is_dot(low, units[0])
    return list(low.each_part(home, axis, tuple(carries), tuple(inits), body, flat))


def _looped(low: Lowering, units: list[Unit], axis: str, home: Scope) -> list[t.Value]:
    """One loop over the blocks of `axis`, and what it leaves of each reduction brought together."""
    carries, inits = [], []
    for unit in units:
        hint, n = _hint(low, unit, axis), _node(low, unit)
        if isinstance(unit, Twins):
            axes = accumulator_axes(low, unit)
        else:
            axes = low.tile_axes(n.axes if _is_dot(low, unit) else _operand_axes(low, n))
        inits.append(low.emit(home, t.Full, f"{hint}_init", n.dtype, axes, value=IDENTITY[_kind(n), n.dtype]))
        carries.append(t.Value(low.names.fresh(f"{hint}_acc"), n.dtype, axes))

    def body(scope: Scope) -> list[t.Value]:
        yields = []
        for unit, carry in zip(units, carries, strict=True):
            n = _node(low, unit)
            if isinstance(unit, Twins):
                yields.append(_dot(low, axis, operands(low, unit, scope), scope, carry))
            elif _is_dot(low, unit):
                yields.append(_dot(low, axis, [low.value(a, scope) for a in n.args], scope, carry))
            else:
                value = low.remask(scope, _reducible(low, n, scope), axis, IDENTITY[_kind(n), n.dtype])
                yields.append(low.binary(scope, COMBINE[_kind(n)], carry, value, carry.name))
        return yields

    outs = low.loop(home, axis, tuple(carries), tuple(inits), body)
    plain = [unit if isinstance(unit, int) else unit.nodes[0] for unit in units]
    return [reduce(low, m, home, _kind(low.graph.nodes[m]), out, axis) for m, out in zip(plain, outs, strict=True)]


def _node(low: Lowering, unit: Unit) -> Node:
    """A reduction of a unit: twins are alike."""
    return low.graph.nodes[unit.nodes[0] if isinstance(unit, Twins) else unit]


def _is_dot(low: Lowering, unit: Unit) -> bool:
    return isinstance(unit, Twins) or (_node(low, unit).op == "contract" and uses_dot(low.graph, low.schedule, unit))


def _hint(low: Lowering, unit: Unit, axis: str) -> str:
    """What the accumulator of a unit is called."""
    names = [low.graph.names.get(m) for m in (unit.nodes if isinstance(unit, Twins) else (unit,))]
    return "_".join(filter(None, names)) or f"{_kind(_node(low, unit))}_{identifier(axis)}"


def _shares_loop(low: Lowering, other: int, node: int, axis: str) -> bool:
    a, b = low.graph.nodes[other], low.graph.nodes[node]
    if a.op not in ("reduce", "contract") or a.attr("axis") != axis or low.level[other] != low.level[node]:
        return False
    return low.looped & set(a.axes) == low.looped & set(b.axes)


def _operand_axes(low: Lowering, n: Node) -> set[str]:
    return {a for arg in n.args for a in low.graph.nodes[arg].axes}


def _kind(n: Node) -> str:
    return "sum" if n.op == "contract" else n.attr("kind")
