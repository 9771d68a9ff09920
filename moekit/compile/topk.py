"""top_k: k steps of "find the best key that is left"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.reductions import IDENTITY, reduce
from moekit.compile.scope import Scope
from moekit.lang.graph import Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering


def top_k(low: Lowering, node: int, n: Node, home: Scope) -> t.Value:
    """k steps, each finding the best key below the one before. A key of 16 bits carries its index in its low half."""
    axis, into, packed = n.attr("axis"), n.attr("into"), n.attr("bits") == 16
    keys = low.value(n.args[0], home)
    index, lowest = low.bound(home, axis)[0], IDENTITY["max", "int32"]
    if packed:
        inverted = low.binary(home, "sub", low.const(home, 0xFFFF), index)
        keys = low.binary(home, "or", keys, inverted, "packed")
    else:
        keys = low.remask(home, keys, axis, lowest)
    others = set(low.graph.nodes[n.args[0]].axes) - {axis}
    into_axes = low.tile_axes(others | {into})
    inits = [low.emit(home, t.Full, "best_init", "int32", into_axes, value=0)]
    if packed:
        inits.append(low.emit(home, t.Full, "base_init", "int32", low.tile_axes(others), value=0))
    else:
        inits += [low.emit(home, t.Full, "ids_init", "int32", into_axes, value=0), keys]
    hints = ("best", "base") if packed else ("best", "ids", "keys")
    carries = tuple(t.Value(low.names.fresh(c), "int32", i.axes) for c, i in zip(hints, inits, strict=True))
    var, scope = t.Value(low.names.fresh("rank"), "int32"), Scope(home)
    here = low.binary(scope, "eq", low.bound(scope, into)[0], var)
    if packed:
        yields = _packed_step(low, scope, here, carries[0], carries[1], keys, axis)
    else:
        yields = _plain_step(low, scope, here, carries[0], carries[1], carries[2], axis)
    outs = tuple(t.Value(low.names.fresh(c.name), c.dtype, c.axes) for c in carries)
    home.ops.append(t.Loop(var, n.attr("k"), 1, carries, tuple(inits), tuple(scope.ops), yields, outs))
    best, ids = outs[:2]
    if packed:
        inverted = low.binary(home, "and", best, low.const(home, 0xFFFF))
        ids = low.binary(home, "sub", low.const(home, 0xFFFF), inverted, "ids")
        best = low.binary(home, "sub", best, inverted, "best")
    for other, m in low.numbered(low.graph.live()):
        if m.op == "top_k" and m.args == n.args and m.attrs[:-1] == n.attrs[:-1]:
            home.made[other] = best if m.attr("part") == "keys" else ids
    return home.made[node]


def _packed_step(low: Lowering, scope: Scope, here, best, base, keys, axis: str) -> tuple[t.Value, ...]:
    """The best key below the last: keys are unique, so none need be struck out.

    Seen from 2^31 below the last, round the circle of 32-bit integers, the keys that are left come out highest and those that
    were taken lowest. A subtraction and a maximum are one instruction on an H200 (VIADDMNMX), where striking out is two more.
    Of the 434 instructions that a router's 8 best of 256 took, 56 went with it, 38 with cheaper keys, 73 with the exponentials
    of the others. In bfloat16, µs at T = 1 and 256: 1.21 and 1.49, once 1.31 and 1.63; 10 of 512: 1.46 and 1.80, once 1.74 and
    2.31; an empty kernel: 0.81 and 0.95. A loop that is not unrolled takes 10 % longer, four rows in a program do to T = 1024.
    """
    lowest = IDENTITY["max", "int32"]
    above = low.remask(scope, low.binary(scope, "sub", keys, base, "above"), axis, lowest)
    top = low.binary(scope, "add", reduce(low, -1, scope, "max", above, axis), base, "top")
    return low.where(scope, here, top, best, "best"), low.binary(scope, "xor", top, low.const(scope, lowest), "base")


def _plain_step(low: Lowering, scope: Scope, here, best, ids, keys, axis: str) -> tuple[t.Value, ...]:
    """The best key and the first index that has it, which is struck out."""
    index, mask = low.bound(scope, axis)
    top = reduce(low, -1, scope, "max", keys, axis)
    hit = low.binary(scope, "eq", keys, top)
    hit = low.all(scope, (hit, mask)) or hit
    found = low.where(scope, hit, index, low.const(scope, IDENTITY["min", "int32"]), "found")
    first = reduce(low, -1, scope, "min", found, axis)
    struck = low.where(scope, low.binary(scope, "eq", index, first), low.const(scope, IDENTITY["max", "int32"]), keys, "keys")
    return low.where(scope, here, top, best, "best"), low.where(scope, here, first, ids, "ids"), struck
