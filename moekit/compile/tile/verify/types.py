"""What each tile operation asks of its operands' dtypes and axes: a table from operation to check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moekit.compile import tile as t
from moekit.lang import dtypes
from moekit.lang.elementwise import ELEMENTWISE
from moekit.lang.graph import COMPARE, UNARY


def _binary_type(p: t.TileProgram, op: t.Binary) -> str | None:
    if op.left.dtype != op.right.dtype:
        return f"{op.op} of {op.left.dtype} and {op.right.dtype}; cast one"
    if ELEMENTWISE[op.op].domain in ("bits", "integer") and dtypes.is_float(op.left.dtype):
        return f"{op.op} of floats; bitcast first"
    if op.out.dtype != ("bool" if op.op in COMPARE else op.left.dtype):
        return f"{op.op} of {op.left.dtype} is not {op.out.dtype}"
    return _joined(p, op.out, op.left, op.right)


def _joined(p: t.TileProgram, out: t.Value, *parts: t.Value) -> str | None:
    names = {a for p in parts for a in p.axes}
    wanted = p.ordered(names)
    return None if out.axes == wanted else f"{out.label} has axes {out.axes}; its operands give {wanted}"


def _where_type(p: t.TileProgram, op: t.Where) -> str | None:
    if op.condition.dtype != "bool":
        return f"the condition is {op.condition.dtype}; it must be bool"
    if not op.yes.dtype == op.no.dtype == op.out.dtype:
        return f"the branches are {op.yes.dtype} and {op.no.dtype}, the result {op.out.dtype}; they must agree"
    return _joined(p, op.out, op.condition, op.yes, op.no)


def _unary_type(p: t.TileProgram, op: t.Unary) -> str | None:
    if op.op not in UNARY:
        return f"there is no operation {op.op!r}"
    if op.op not in ("neg", "abs", "not") and op.value.dtype != "float32":
        return f"{op.op} of {op.value.dtype}; it is done in float32"
    return None if (op.out.dtype, op.out.axes) == (op.value.dtype, op.value.axes) else "the result differs from the operand"


def _reduce_type(p: t.TileProgram, op: t.Reduce) -> str | None:
    if op.axis not in op.value.axes:
        return f"{op.value.label} does not vary over {op.axis}"
    if op.value.dtype not in ("float32", "int32", "int64"):
        return f"a reduction of {op.value.dtype}; it is done in float32 or integers, so cast first"
    wanted = tuple(a for a in op.value.axes if a != op.axis)
    return None if (op.out.axes, op.out.dtype) == (wanted, op.value.dtype) else f"the result must be {op.value.dtype}{wanted}"


def _accumulate_type(p: t.TileProgram, op: t.Accumulate) -> str | None:
    if not op.acc.dtype == op.value.dtype == op.out.dtype:
        return f"{op.value.label} is {op.value.dtype}, its accumulator {op.acc.dtype}; they must agree"
    return _joined(p, op.out, op.acc, op.value) or _merged((op.acc,), (op.out,))


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
    param = p.param(op.at.tensor)
    if op.out.dtype != param.dtype:
        return f"{param.name} is {param.dtype}, not {op.out.dtype}"
    return _access_type(p, op.at) or _joined(p, op.out, *(i.value for i in op.at.index if i.value), *op.at.mask)


def _access_type(p: t.TileProgram, at: t.Access, *others: t.Value) -> str | None:
    """What is wrong with an access, or with values (its mask is one) that vary along axes its index does not run along."""
    param = p.param(at.tensor)
    if len(at.index) != len(param.axes) or len(at.wide) not in (0, len(param.axes)):
        return f"{param.name} has {len(param.axes)} dimensions, the index {len(at.index)}"
    if bad := [v for v in at.mask if v.dtype != "bool"]:
        return f"the mask is {bad[0].dtype}; it must be bool"
    if bad := [i.value for i in at.index if i.value and i.value.dtype not in ("int32", "int64")]:
        return f"the index {bad[0].label} is {bad[0].dtype}; it must be an integer"
    if bad := [i.value for i in at.index if i.side and i.value and not any(p.axis(a).of for a in i.value.axes)]:
        return f"{bad[0].label} is along no axis twice, so it has no second half"
    if extra := {a for v in others for a in v.axes} - at.axes:
        return f"the value or the mask varies over {sorted(extra)[0]}, the index does not"
    return None


def _store_type(p: t.TileProgram, op: t.Store) -> str | None:
    param = p.param(op.at.tensor)
    if op.value.dtype != param.dtype:
        return f"{param.name} is {param.dtype}, the value {op.value.dtype}; cast it"
    return _access_type(p, op.at, op.value, *op.at.mask)


def _prefetch_type(p: t.TileProgram, op: t.Prefetch) -> str | None:
    param = p.param(op.at.tensor)
    lines, rest = divmod(op.size * dtypes.itemsize(param.dtype), t.LINE)
    if rest or lines < 1 or lines & (lines - 1):
        return f"{op.size} elements of {param.dtype} are no power of two of memory lines"
    if not isinstance(param.layout, t.Strided) or op.along not in range(len(param.axes)):
        return f"{param.name} has no strided dimension {op.along}"
    if param.layout.strides[op.along] != "unit":
        return f"the elements of {param.name} do not lie side by side along dimension {op.along}"
    if (begin := op.at.index[op.along].value) is not None and begin.axes:
        return f"it begins at {begin.label}, which must be one number"
    return _access_type(p, op.at, *op.at.mask)


def _merged(*groups: tuple[t.Value, ...]) -> str | None:
    """What is wrong with values that stand for each other."""
    if len({len(group) for group in groups}) > 1:
        return "carries, inits, yields and outs differ in number"
    for values in zip(*groups, strict=True):
        if len({(v.dtype, v.axes) for v in values}) != 1:
            return f"{', '.join(map(str, values))} must be of one dtype and shape"
    return None


def _loop_type(p: t.TileProgram, op: t.Loop) -> str | None:
    if len(op.vars) != len(op.over) or any(isinstance(a, int) and a < 1 for a in op.over):
        return f"it goes over {op.over} with {len(op.vars)} variables"
    return _merged(op.carries, op.inits, op.yields, op.outs)


def _cast_type(p: t.TileProgram, op: t.Cast | t.Bitcast) -> str | None:
    if isinstance(op, t.Bitcast) and dtypes.itemsize(op.out.dtype) != dtypes.itemsize(op.value.dtype):
        return "the width changes"
    return _joined(p, op.out, op.value)


def _mask_type(p: t.TileProgram, op: t.InBounds) -> str | None:
    return "a mask is bool" if op.out.dtype != "bool" else _joined(p, op.out, op.value)


def _elements_type(p: t.TileProgram, op: t.Elements) -> str | None:
    wanted = (op.axis,) if p.axis(op.axis).block > 1 else ()
    return None if (op.out.dtype, op.out.axes) == ("int32", wanted) else f"it must be int32{wanted}"


def _top_k_type(p: t.TileProgram, op: t.TopK) -> str | None:
    if {v.dtype for v in (*op.outs, op.keys)} != {"int32"}:
        return "keys and ids are int32"
    others = replace(op.keys, axes=tuple({*op.keys.axes} - {op.axis}))
    return _merged((op.outs[0],), (op.outs[1],)) or _joined(p, op.outs[0], others, op.ranks)


def _scan_type(p: t.TileProgram, op: t.Scan) -> str | None:
    if op.axis not in op.value.axes:
        return f"{op.value.label} does not vary over {op.axis}"
    return None if (op.out.dtype, op.out.axes) == (op.value.dtype, op.value.axes) else "the result differs from the operand"


def _halves_type(p: t.TileProgram, op: t.Halves) -> str | None:
    of = p.axis(op.axis).of
    if of is None or op.axis not in op.value.axes:
        return f"{op.value.label} has no halves along {op.axis}"
    wanted = (op.value.dtype, p.ordered({*op.value.axes, of} - {op.axis}))
    return None if all((v.dtype, v.axes) == wanted for v in op.outs) else f"the results must be {wanted[0]}{wanted[1]}"


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
    t.AtEnd: lambda p, op: _merged(op.yields, op.otherwise, op.outs),
    t.TopK: _top_k_type,
    t.Cast: _cast_type,
    t.Bitcast: _cast_type,
    t.InBounds: _mask_type,
    t.Elements: _elements_type,
    t.Scan: _scan_type,
    t.Accumulate: _accumulate_type,
    t.Halves: _halves_type,
}
