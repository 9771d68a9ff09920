"""Reductions and contractions: whole in one block, or accumulated in a loop that equally deep ones share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.naming import identifier
from moekit.compile.schedule import uses_dot
from moekit.compile.scope import Scope
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
COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


def reduction(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    axis = n.attr("axis")
    if axis in low.looped:
        return _loop_reductions(low, node, n, home)
    if n.op == "contract" and uses_dot(low.graph, low.schedule, node):
        return _dot(low, n, home, home, None)
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


def _dot(low: Lowering, n: Node, home: Scope, scope: Scope, acc: t.Value | None) -> t.Value:
    axis = n.attr("axis")
    left, right = (low.remask(scope, low.value(a, scope), axis, 0) for a in n.args)
    axes = low.tile_axes((set(left.axes) | set(right.axes)) - {axis})
    if axes[0] in right.axes:
        left, right = right, left
    return low.emit(scope, t.Dot, "acc", "float32", axes, left=left, right=right, axis=axis, acc=acc)


def _loop_reductions(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    """Open one loop for this reduction and for all that are as deep, over the same axis and in the same scope."""
    axis = n.attr("axis")
    group = [m for m in low.graph.live() if _shares_loop(low, m, node, axis) and m not in home.made]
    results = _in_parts(low, group, axis, home) if axis in dict(low.schedule.parts) else _looped(low, group, axis, home)
    home.made |= dict(zip(group, results, strict=True))
    return home.made[node]


def _in_parts(low: Lowering, group: list[int], axis: str, home: Scope) -> list[t.Value]:
    """Reductions part by part, the parts' results added up in the order in which a split's second launch adds them."""
    carries, inits = [], []
    for m, other in low.numbered(group):
        hint, identity = low.graph.names.get(m, f"{_kind(other)}_{identifier(axis)}"), IDENTITY[_kind(other), other.dtype]
        inits.append(low.emit(home, t.Full, f"{hint}_init", other.dtype, low.tile_axes(other.axes), value=identity))
        carries.append(t.Value(low.names.fresh(f"{hint}_total"), other.dtype, inits[-1].axes))

    def body(scope: Scope) -> list[t.Value]:
        done = zip(low.numbered(group), carries, _looped(low, group, axis, scope), strict=True)
        return [low.binary(scope, COMBINE[_kind(m)], total, value, total.name) for (_, m), total, value in done]

    return list(low.each_part(home, axis, tuple(carries), tuple(inits), body))


def _looped(low: Lowering, group: list[int], axis: str, home: Scope) -> list[t.Value]:
    """One loop over the blocks of `axis`, and what it leaves of each reduction brought together."""
    dots = {m: n.op == "contract" and uses_dot(low.graph, low.schedule, m) for m, n in low.numbered(group)}
    carries, inits = [], []
    for m, other in low.numbered(group):
        axes = low.tile_axes(other.axes if dots[m] else _operand_axes(low, other))
        identity = IDENTITY[_kind(other), other.dtype]
        hint = low.graph.names.get(m, f"{_kind(other)}_{identifier(axis)}")
        inits.append(low.emit(home, t.Full, f"{hint}_init", other.dtype, axes, value=identity))
        carries.append(t.Value(low.names.fresh(f"{hint}_acc"), other.dtype, axes))

    def body(scope: Scope) -> list[t.Value]:
        yields = []
        for (m, other), carry in zip(low.numbered(group), carries, strict=True):
            if dots[m]:
                yields.append(_dot(low, other, home, scope, carry))
            else:
                value = low.remask(scope, _reducible(low, other, scope), axis, IDENTITY[_kind(other), other.dtype])
                yields.append(low.binary(scope, COMBINE[_kind(other)], carry, value, carry.name))
        return yields

    outs = low.loop(home, axis, tuple(carries), tuple(inits), body)
    return [reduce(low, m, home, _kind(low.graph.nodes[m]), out, axis) for m, out in zip(group, outs, strict=True)]


def _shares_loop(low: Lowering, other: int, node: int, axis: str) -> bool:
    a, b = low.graph.nodes[other], low.graph.nodes[node]
    if a.op not in ("reduce", "contract") or a.attr("axis") != axis or low.level[other] != low.level[node]:
        return False
    return low.looped & set(a.axes) == low.looped & set(b.axes)


def _operand_axes(low: Lowering, n: Node) -> set[str]:
    return {a for arg in n.args for a in low.graph.nodes[arg].axes}


def _kind(n: Node) -> str:
    return "sum" if n.op == "contract" else n.attr("kind")
