"""What each tile operation asks of its operands' dtypes and axes: a table from operation to check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moekit.compile import tile as t
from moekit.lang import dtypes
from moekit.lang.graph import BITWISE, COMPARE, UNARY


def _binary_type(p: t.TileProgram, op: t.Binary) -> str | None:
    if op.left.dtype != op.right.dtype:
        return f"{op.op} of {op.left.dtype} and {op.right.dtype}; cast one"
    if op.op in BITWISE and dtypes.is_float(op.left.dtype):
        return f"{op.op} of floats; bitcast first"
    if op.out.dtype != ("bool" if op.op in COMPARE else op.left.dtype):
        return f"{op.op} of {op.left.dtype} is not {op.out.dtype}"
    return _joined(p, op.out, op.left, op.right)


def _joined(p: t.TileProgram, out: t.Value, *parts: t.Value) -> str | None:
    names = {a for p in parts for a in p.axes}
    wanted = tuple(a.name for a in p.axes if a.name in names)
    return None if out.axes == wanted else f"{out.name} has axes {out.axes}; its operands give {wanted}"


def _where_type(p: t.TileProgram, op: t.Where) -> str | None:
    if op.condition.dtype != "bool":
        return f"the condition is {op.condition.dtype}; it must be bool"
    if not op.yes.dtype == op.no.dtype == op.out.dtype:
        return f"the branches are {op.yes.dtype} and {op.no.dtype}, the result {op.out.dtype}; they must agree"
    return _joined(p, op.out, op.condition, op.yes, op.no)


def _unary_type(p: t.TileProgram, op: t.Unary) -> str | None:
    if op.op not in UNARY or op.op == "softplus":
        return f"there is no operation {op.op!r}"
    if op.op not in ("neg", "abs", "not") and op.value.dtype != "float32":
        return f"{op.op} of {op.value.dtype}; it is done in float32"
    return None if (op.out.dtype, op.out.axes) == (op.value.dtype, op.value.axes) else "the result differs from the operand"


def _reduce_type(p: t.TileProgram, op: t.Reduce) -> str | None:
    if op.axis not in op.value.axes:
        return f"{op.value.name} does not vary over {op.axis}"
    if op.value.dtype not in ("float32", "int32", "int64"):
        return f"a reduction of {op.value.dtype}; it is done in float32 or integers, so cast first"
    wanted = tuple(a for a in op.value.axes if a != op.axis)
    return None if (op.out.axes, op.out.dtype) == (wanted, op.value.dtype) else f"the result must be {op.value.dtype}{wanted}"


def _dot_type(p: t.TileProgram, op: t.Dot) -> str | None:
    shared = set(op.left.axes) & set(op.right.axes)
    if shared != {op.axis} or len(op.left.axes) != 2 or len(op.right.axes) != 2:
        return f"it multiplies [m, k] by [k, n], got {op.left.axes} and {op.right.axes}"
    if op.left.dtype != op.right.dtype or not dtypes.is_float(op.left.dtype):
        return f"it multiplies floats of one dtype, got {op.left.dtype} and {op.right.dtype}"
    if op.out.dtype != "float32":
        return f"it accumulates in float32, not {op.out.dtype}"
    if op.acc is not None and (op.acc.dtype, op.acc.axes) != (op.out.dtype, op.out.axes):
        return f"its accumulator is {op.acc}"
    return None if op.out.axes[0] in op.left.axes else f"its left operand must vary over {op.out.axes[0]}"


def _load_type(p: t.TileProgram, op: t.Load) -> str | None:
    param = p.param(op.tensor)
    if op.out.dtype != param.dtype:
        return f"{op.tensor} is {param.dtype}, not {op.out.dtype}"
    return _address_type(p, op, param) or _joined(p, op.out, *(v for v in (*op.index, op.mask) if v is not None))


def _address_type(p: t.TileProgram, op, param: t.Param) -> str | None:
    if len(op.index) != len(param.axes) or len(op.wide) != len(param.axes):
        return f"{param.name} has {len(param.axes)} dimensions, the index {len(op.index)}"
    if op.mask is not None and op.mask.dtype != "bool":
        return f"the mask is {op.mask.dtype}; it must be bool"
    if bad := [v for v in op.index if v is not None and v.dtype not in ("int32", "int64")]:
        return f"the index {bad[0].name} is {bad[0].dtype}; it must be an integer"
    return None


def _store_type(p: t.TileProgram, op: t.Store) -> str | None:
    param = p.param(op.tensor)
    if op.value.dtype != param.dtype:
        return f"{op.tensor} is {param.dtype}, the value {op.value.dtype}; cast it"
    reached = {a for v in op.index if v is not None for a in v.axes}
    if extra := {*op.value.axes, *(op.mask.axes if op.mask else ())} - reached:
        return f"the value varies over {sorted(extra)[0]}, the index does not"
    return _address_type(p, op, param)


def _prefetch_type(p: t.TileProgram, op: t.Prefetch) -> str | None:
    param = p.param(op.tensor)
    lines, rest = divmod(op.size * dtypes.itemsize(param.dtype), t.LINE)
    if rest or lines < 1 or lines & (lines - 1):
        return f"{op.size} elements of {param.dtype} are no power of two of memory lines"
    if not isinstance(param.layout, t.Strided) or op.along not in range(len(param.axes)):
        return f"{op.tensor} has no strided dimension {op.along}"
    if param.layout.strides[op.along] != "unit":
        return f"the elements of {op.tensor} do not lie side by side along dimension {op.along}"
    if (begin := op.index[op.along]) is not None and begin.axes:
        return f"it begins at {begin.name}, which must be one number"
    reached = {a for v in op.index if v is not None for a in v.axes}
    if extra := set(op.mask.axes if op.mask else ()) - reached:
        return f"the mask varies over {sorted(extra)[0]}, the index does not"
    return _address_type(p, op, param)


def _loop_type(p: t.TileProgram, op: t.Loop) -> str | None:
    if not len(op.carries) == len(op.inits) == len(op.yields) == len(op.outs):
        return "carries, inits, yields and outs differ in number"
    for group in zip(op.carries, op.inits, op.yields, op.outs, strict=True):
        if len({(v.dtype, v.axes) for v in group}) != 1:
            return f"{', '.join(map(str, group))} must be of one dtype and shape"
    return None if op.step >= 1 else f"its step is {op.step}"


def _cast_type(p: t.TileProgram, op: t.Cast | t.Bitcast) -> str | None:
    if isinstance(op, t.Bitcast) and dtypes.itemsize(op.out.dtype) != dtypes.itemsize(op.value.dtype):
        return "the width changes"
    return _joined(p, op.out, op.value)


def _mask_type(p: t.TileProgram, op: t.InBounds) -> str | None:
    return "a mask is bool" if op.out.dtype != "bool" else _joined(p, op.out, op.index)


def _index_type(p: t.TileProgram, op: t.Index) -> str | None:
    wanted = (op.axis,) if p.axis(op.axis).block > 1 else ()
    if len(op.out.axes) == 1 and p.axis(op.out.axes[0]).of == op.axis:
        wanted = op.out.axes
    return None if (op.out.dtype, op.out.axes) == ("int32", wanted) else f"it must be int32{wanted}"


def _scan_type(p: t.TileProgram, op: t.Scan) -> str | None:
    if op.axis not in op.value.axes:
        return f"{op.value.name} does not vary over {op.axis}"
    return None if (op.out.dtype, op.out.axes) == (op.value.dtype, op.value.axes) else "the result differs from the operand"


def _sides_type(p: t.TileProgram, op: t.Sides) -> str | None:
    if p.axis(op.axis).of is None:
        return f"{op.axis} is no axis twice"
    return None if (op.out.dtype, op.out.axes) == ("int32", (op.axis,)) else f"it must be int32{(op.axis,)}"


def _half_type(p: t.TileProgram, op: t.Half) -> str | None:
    of = p.axis(op.axis).of
    if of is None or op.axis not in op.value.axes or op.side not in (0, 1):
        return f"{op.value.name} has no half {op.side} along {op.axis}"
    wanted = tuple(a.name for a in p.axes if a.name in {*op.value.axes, of} - {op.axis})
    return None if (op.out.dtype, op.out.axes) == (op.value.dtype, wanted) else f"the result must be {op.value.dtype}{wanted}"


TYPES: dict[type, Callable[[t.TileProgram, Any], str | None]] = {
    t.Binary: _binary_type,
    t.Where: _where_type,
    t.Unary: _unary_type,
    t.Reduce: _reduce_type,
    t.Dot: _dot_type,
    t.Load: _load_type,
    t.Store: _store_type,
    t.Prefetch: _prefetch_type,
    t.Loop: _loop_type,
    t.Cast: _cast_type,
    t.Bitcast: _cast_type,
    t.InBounds: _mask_type,
    t.Index: _index_type,
    t.Scan: _scan_type,
    t.Sides: _sides_type,
    t.Half: _half_type,
}
