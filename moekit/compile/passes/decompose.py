"""Operations that no target has become some that all have: top-k and softplus."""

from __future__ import annotations

from dataclasses import replace

from moekit.compile import tile as t
from moekit.lang.elementwise import IDENTITY

LOWEST, HIGHEST = IDENTITY["max", "int32"], IDENTITY["min", "int32"]
INDEX_BITS = 0xFFFF
SERIES = (15, 13, 11, 9, 7, 5, 3, 1)


def decompose(program: t.TileProgram) -> t.TileProgram:
    """The program without top-k and softplus."""
    numbers = t.Numbers(program.body)

    def rule(op: t.Op) -> list[t.Op] | None:
        numbers.line = next((v.line for v in t.results(op)), "")
        if isinstance(op, t.Unary) and op.op == "softplus":
            return _softplus(t.Draft(program, numbers), op)
        if isinstance(op, t.TopK):
            return (_packed if op.packed else _plain)(t.Draft(program, numbers), op)
        return None

    return replace(program, body=t.rewrite(program.body, rule))


def _softplus(d: t.Draft, op: t.Unary) -> list[t.Op]:
    """max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2·artanh(s) = 2·s·(1 + s²/3 + s⁴/5 + …) for s = e/(e + 2) <= 1/3.

    Kahan's log(u)·e/(u - 1) with u = 1 + e is shorter, but XLA takes (1 + e) - 1 for e where it interprets a kernel on a CPU.
    """

    def number(value: float) -> t.Value:
        return d.const(value, "float32")

    e = d.unary("exp", d.binary("mul", d.unary("abs", op.value), number(-1.0)))
    s = d.binary("div", e, d.binary("add", e, number(2.0)), "ratio")
    square = d.binary("mul", s, s, "square")
    series = d.binary("mul", square, number(2.0 / SERIES[0]), "series")
    for k in SERIES[1:]:
        series = d.binary("mul", d.binary("add", series, number(2.0 / k)), square if k > 1 else s, "series")
    d.binary("add", d.binary("maximum", op.value, number(0.0)), series)
    return d.becomes(op.out)


def _reduce(d: t.Draft, kind: str, value: t.Value, axis: str, name: str) -> t.Value:
    return d.emit(t.Reduce, name, op=kind, value=value, axis=axis) if axis in value.axes else value


def _loop(d: t.Draft, op: t.TopK, names: tuple[str, ...], inits: list[t.Value], outs: list[t.Value], step) -> t.Loop:
    """k times `step`, which takes the place of a rank and the carries, and gives what they become."""
    carries = tuple(map(d.numbers.like, inits, names))
    rank, inner = d.numbers.value("int32", (), "rank"), t.Draft(d.program, d.numbers)
    yields = step(inner, inner.binary("eq", op.ranks, rank, "here"), *carries)
    return t.Loop((rank,), (op.k,), carries, tuple(inits), tuple(inner.ops), yields, tuple(outs))


def _packed(d: t.Draft, op: t.TopK) -> list[t.Op]:
    """k times the best key below the last: each carries its index in its low half, so that none need be struck out.

    Seen from 2^31 below the last, round the circle of 32-bit integers, the keys that are left come out highest and those that
    were taken lowest. A subtraction and a maximum are one instruction on an H200 (VIADDMNMX), where striking out is two more.
    """
    low_half, lowest = d.const(INDEX_BITS, name="INDEX_BITS"), d.const(LOWEST, name="LOWEST")
    keys = d.binary("or", op.keys, d.binary("sub", low_half, op.elements), "packed")
    inits = [d.const(0, axes=op.outs[0].axes), d.const(0, axes={*op.keys.axes} - {op.axis})]

    def step(inner: t.Draft, here: t.Value, best: t.Value, base: t.Value) -> tuple[t.Value, ...]:
        above = inner.binary("sub", keys, base, "above")
        top = inner.binary("add", _reduce(inner, "max", above, op.axis, "nearest"), base, "top")
        return inner.where(here, top, best, "best"), inner.binary("xor", top, lowest, "base")

    outs = list(map(d.numbers.like, inits, ("best", "base")))
    d.ops.append(_loop(d, op, ("best", "base"), inits, outs, step))
    inverted = d.binary("and", outs[0], low_half, "inverted")
    d.binary("sub", low_half, inverted)
    ops = d.becomes(op.outs[1])
    return [*ops, t.Binary(op.outs[0], "sub", outs[0], inverted)]


def _plain(d: t.Draft, op: t.TopK) -> list[t.Op]:
    """k times the best key and the first index that has it, which is struck out."""
    lowest, highest = d.const(LOWEST, name="LOWEST"), d.const(HIGHEST, name="HIGHEST")
    inits = [d.const(0, axes=op.outs[0].axes), d.const(0, axes=op.outs[0].axes), op.keys]

    def step(inner: t.Draft, here: t.Value, best: t.Value, ids: t.Value, keys: t.Value) -> tuple[t.Value, ...]:
        top = _reduce(inner, "max", keys, op.axis, "top")
        candidates = inner.where(inner.binary("eq", keys, top), op.elements, highest)
        first = _reduce(inner, "min", candidates, op.axis, "first")
        struck = inner.where(inner.binary("eq", op.elements, first), lowest, keys, "keys")
        return inner.where(here, top, best, "best"), inner.where(here, first, ids, "ids"), struck

    outs = [*op.outs, d.numbers.like(op.keys, "keys")]
    return [*d.ops, _loop(d, op, ("best", "ids", "keys"), inits, outs, step)]
