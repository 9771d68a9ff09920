"""top_k: k steps of "find the best key, keep it, strike it out"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.reductions import IDENTITY, reduce
from moekit.compile.scope import Scope
from moekit.lang.graph import Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering


def top_k(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    """k steps of: find the best key, keep it, strike it out. A 16-bit key carries its index in its low half."""
    axis, into, packed = n.attr("axis"), n.attr("into"), n.attr("bits") == 16
    keys = low.value(n.args[0], home)
    index, lowest = low.bound(home, axis)[0], IDENTITY["max", "int32"]
    if packed:
        inverted = low.binary(home, "sub", low.const(home, 0xFFFF), index)
        high = low.binary(home, "shl", keys, low.const(home, 16))
        keys = low.binary(home, "or", high, inverted, "packed")
    keys = low.remask(home, keys, axis, lowest)
    into_axes = low.tile_axes((set(low.graph.nodes[n.args[0]].axes) - {axis}) | {into})
    inits = [keys, low.emit(home, t.Full, "best_init", "int32", into_axes, value=0)]
    if not packed:
        inits.append(low.emit(home, t.Full, "ids_init", "int32", into_axes, value=0))
    carries = tuple(t.Value(low.names.fresh(c), "int32", i.axes) for c, i in zip(("keys", "best", "ids"), inits, strict=False))
    var, scope = t.Value(low.names.fresh("rank"), "int32"), Scope(home)
    step = _packed_step if packed else _plain_step
    yields = step(low, scope, var, carries, axis, into)
    outs = tuple(t.Value(low.names.fresh(c.name), c.dtype, c.axes) for c in carries)
    home.ops.append(t.Loop(var, n.attr("k"), 1, carries, tuple(inits), tuple(scope.ops), yields, outs))
    best, ids = outs[1], outs[-1]
    if packed:
        inverted = low.binary(home, "and", best, low.const(home, 0xFFFF))
        ids = low.binary(home, "sub", low.const(home, 0xFFFF), inverted, "ids")
        best = low.binary(home, "shr", best, low.const(home, 16), "best")
    for other, m in low.numbered(low.graph.live()):
        if m.op == "top_k" and m.args == n.args and m.attrs[:-1] == n.attrs[:-1]:
            home.made[other] = best if m.attr("part") == "keys" else ids
    return home.made[node]


def _packed_step(low: Lowering, scope: Scope, rank: t.Value, carries, axis: str, into: str) -> tuple[t.Value, ...]:
    keys, best = carries
    top = reduce(low, -1, scope, "max", keys, axis)
    here = low.binary(scope, "eq", low.bound(scope, into)[0], rank)
    struck = low.where(scope, low.binary(scope, "eq", keys, top), low.const(scope, IDENTITY["max", "int32"]), keys, "keys")
    return struck, low.where(scope, here, top, best, "best")


def _plain_step(low: Lowering, scope: Scope, rank: t.Value, carries, axis: str, into: str) -> tuple[t.Value, ...]:
    keys, best, ids = carries
    index, mask = low.bound(scope, axis)
    top = reduce(low, -1, scope, "max", keys, axis)
    hit = low.binary(scope, "eq", keys, top)
    hit = low.all(scope, (hit, mask)) or hit
    found = low.where(scope, hit, index, low.const(scope, IDENTITY["min", "int32"]), "found")
    first = reduce(low, -1, scope, "min", found, axis)
    here = low.binary(scope, "eq", low.bound(scope, into)[0], rank)
    struck = low.where(scope, low.binary(scope, "eq", index, first), low.const(scope, IDENTITY["max", "int32"]), keys, "keys")
    return struck, low.where(scope, here, top, best, "best"), low.where(scope, here, first, ids, "ids")
