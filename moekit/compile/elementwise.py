"""Graph nodes that are one tile operation, or a few, element by element: a table from op to rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.naming import TEMPORARY
from moekit.compile.scope import Scope
from moekit.lang.dtypes import is_float
from moekit.lang.graph import BINARY, UNARY, Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering


def _elementwise(kind, field_names: tuple[str, ...], op: bool = True):
    """A rule for an element-wise node: one tile operation with the node's operands."""

    def rule(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
        axes = low.tile_axes(n.axes)
        fields = dict(zip(field_names, args, strict=True)) | ({"op": n.op} if op else {})
        out = low.emit(scope, kind, name or TEMPORARY, n.dtype, axes, **fields)
        if kind is t.Cast and n.dtype != "bool":
            low.zeroed[out.name] = low.zeroed.get(args[0].name, set())
        return out

    return rule


def _cast(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    """A conversion; bfloat16 becomes float32 by its bits where something is rounded to float16 besides.

    LLVM (that of Triton 3.6) turns float16(float32(b) + float32(h)) into float16(b) + h, which is another number for a bfloat16
    b: it takes a narrower mantissa for a narrower type, and drops b's exponent range. It does not see through the bits.
    """
    halves = any(m.op == "cast" and m.dtype == "float16" for m in low.graph.nodes)
    if (args[0].dtype, n.dtype) != ("bfloat16", "float32") or not halves:
        return _plain_cast(low, n, scope, args, name)
    axes = args[0].axes
    bits = low.emit(scope, t.Bitcast, TEMPORARY, "int16", axes, value=args[0])
    bits = low.emit(scope, t.Cast, TEMPORARY, "int32", axes, value=bits)
    bits = low.binary(scope, "shl", bits, low.const(scope, 16))
    out = low.emit(scope, t.Bitcast, name or TEMPORARY, "float32", axes, value=bits)
    low.zeroed[out.name] = low.zeroed.get(args[0].name, set())
    return out


_plain_cast = _elementwise(t.Cast, ("value",), op=False)


def _neg(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    """-x; of a float as x·-1, which is exact: Triton 3.6 and Pallas's Triton lowering take 0 - x, which makes +0 of +0."""
    if not is_float(n.dtype):
        return _plain_neg(low, n, scope, args, name)
    return low.binary(scope, "mul", args[0], low.const(scope, -1.0, n.dtype), name or TEMPORARY)


_plain_neg = _elementwise(t.Unary, ("value",))


def _iota(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low.along(scope, n.attr("index"))


def _constant(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low.const(scope, n.attr("value"), n.dtype)


def _extent(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low.extent(scope, n.attr("axis"))


def _cumsum(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    if n.attr("axis") not in args[0].axes:
        return args[0]
    return low.emit(scope, t.Scan, name or "running", n.dtype, args[0].axes, value=args[0], axis=n.attr("axis"))


def _softplus(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    """max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2·artanh(s) = 2·s·(1 + s²/3 + s⁴/5 + …) for s = e/(e + 2) <= 1/3.

    Kahan's log(u)·e/(u - 1) with u = 1 + e is shorter, but XLA takes (1 + e) - 1 for e where it interprets a kernel on a CPU.
    """
    x, zero = args[0], low.const(scope, 0.0, "float32")

    def unary(op: str, v: t.Value) -> t.Value:
        return low.emit(scope, t.Unary, TEMPORARY, "float32", v.axes, op=op, value=v)

    e = unary("exp", low.binary(scope, "mul", unary("abs", x), low.const(scope, -1.0, "float32")))
    s = low.binary(scope, "div", e, low.binary(scope, "add", e, low.const(scope, 2.0, "float32")), "ratio")
    square = low.binary(scope, "mul", s, s, "square")
    series = low.binary(scope, "mul", square, low.const(scope, 2.0 / SERIES[0], "float32"), "series")
    for k in SERIES[1:]:
        series = low.binary(scope, "add", series, low.const(scope, 2.0 / k, "float32"), "series")
        series = low.binary(scope, "mul", series, square if k > 1 else s, "series")
    return low.binary(scope, "add", low.binary(scope, "maximum", x, zero), series, name or TEMPORARY)


SERIES = (15, 13, 11, 9, 7, 5, 3, 1)


def _rules() -> dict:
    rules = {op: _elementwise(t.Unary, ("value",)) for op in UNARY if op != "softplus"}
    rules["softplus"] = _softplus
    rules |= {op: _elementwise(t.Binary, ("left", "right")) for op in BINARY}
    return rules | {
        "where": _elementwise(t.Where, ("condition", "yes", "no"), op=False),
        "cast": _cast,
        "neg": _neg,
        "bitcast": _elementwise(t.Bitcast, ("value",), op=False),
        "iota": _iota,
        "const": _constant,
        "extent": _extent,
        "cumsum": _cumsum,
    }


RULES = _rules()
