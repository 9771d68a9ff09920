"""The types of operations, as two tables: what dtype and axes a result has, and what is asked of the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moekit.compile.tile import operations as t
from moekit.compile.tile.program import Mailbox, Strided, TileProgram
from moekit.lang.dtypes import is_float, itemsize
from moekit.lang.elementwise import ELEMENTWISE

Demand = Iterator[tuple[bool, str]]  # what must hold, and the sentence where it does not


def _joined(p: TileProgram, *values: t.Value | None, without: str = "") -> tuple[str, ...]:
    return p.ordered({a for v in values if v is not None for a in v.axes} - {without})


def _like(p: TileProgram, op) -> tuple[str, tuple[str, ...]]:
    return op.value.dtype, op.value.axes


#: The dtype and axes of what an operation makes.
RESULT: dict[type, Callable[[TileProgram, Any], tuple[str, tuple[str, ...]]]] = {
    t.Const: lambda p, op: (op.out.dtype, op.out.axes),
    t.Extent: lambda p, op: ("int32", ()),
    t.Elements: lambda p, op: ("int32", (op.axis,) if p.axis(op.axis).block > 1 else ()),
    t.Sides: lambda p, op: ("int32", (op.axis,)),
    t.InBounds: lambda p, op: ("bool", op.value.axes),
    t.Load: lambda p, op: (p.param(op.at.tensor).dtype, _joined(p, *(v for i in op.at.index for v in i.values), *op.at.mask)),
    t.AllReduce: lambda p, op: ("float32", op.value.axes),
    t.Send: lambda p, op: (op.values[0].dtype, op.values[0].axes),
    t.Receive: lambda p, op: (op.own[0].dtype, op.own[0].axes),
    t.Cast: lambda p, op: (op.out.dtype, op.value.axes),
    t.Bitcast: lambda p, op: (op.out.dtype, op.value.axes),
    t.Along: lambda p, op: (op.value.dtype, op.out.axes),
    t.Unary: _like,
    t.Binary: lambda p, op: (
        "bool" if ELEMENTWISE[op.op].domain == "compare" else op.left.dtype,
        _joined(p, op.left, op.right),
    ),
    t.Where: lambda p, op: (op.yes.dtype, _joined(p, op.condition, op.yes, op.no)),
    t.Reduce: lambda p, op: (op.value.dtype, _joined(p, op.value, without=op.axis)),
    t.Accumulate: lambda p, op: (op.value.dtype, _joined(p, op.acc, op.value)),
    t.Scan: _like,
    t.Dot: lambda p, op: ("float32", _joined(p, op.left, op.right, without=op.axis)),
    t.Halves: lambda p, op: (op.value.dtype, p.ordered({*op.value.axes, p.axis(op.axis).of} - {op.axis})),
    t.Deinterleave: lambda p, op: (op.value.dtype, p.ordered({*op.value.axes, op.into} - {op.axis})),
    t.Interleave: lambda p, op: (op.values[0].dtype, p.ordered({*op.values[0].axes, op.axis} - {op.by})),
    t.TopK: lambda p, op: ("int32", p.ordered({*op.keys.axes, *op.ranks.axes} - {op.axis})),
}


def _unary(p: TileProgram, op: t.Unary) -> Demand:
    yield op.op in ELEMENTWISE, f"there is no operation {op.op!r}"
    needs = ELEMENTWISE[op.op].domain == "float"
    yield not needs or op.value.dtype == "float32", f"{op.op} of {op.value.dtype}; it is done in float32"


def _binary(p: TileProgram, op: t.Binary) -> Demand:
    yield op.op in ELEMENTWISE, f"there is no operation {op.op!r}"
    yield op.left.dtype == op.right.dtype, f"{op.op} of {op.left.dtype} and {op.right.dtype}; cast one"
    bits = ELEMENTWISE[op.op].domain in ("bits", "integer")
    yield not (bits and is_float(op.left.dtype)), f"{op.op} of floats; bitcast first"


def _where(p: TileProgram, op: t.Where) -> Demand:
    yield op.condition.dtype == "bool", f"the condition is {op.condition.dtype}; it must be bool"
    yield op.yes.dtype == op.no.dtype, f"the branches are {op.yes.dtype} and {op.no.dtype}; they must agree"


def _bitcast(p: TileProgram, op: t.Bitcast) -> Demand:
    yield itemsize(op.out.dtype) == itemsize(op.value.dtype), "the width changes"


def _along(p: TileProgram, op: t.Along) -> Demand:
    held, other = ([(p.axis(a).mode, p.axis(a).extent, p.axis(a).block) for a in v.axes] for v in (op.value, op.out))
    yield held == other, f"{op.value.label} is held as {held}, its other axes as {other}; they must be alike"


def _reduce(p: TileProgram, op: t.Reduce | t.Scan) -> Demand:
    yield op.axis in op.value.axes, f"{op.value.label} does not vary over {op.axis}"
    summed = op.value.dtype in ("float32", "int32", "int64")
    yield summed, f"a reduction of {op.value.dtype}; it is done in float32 or integers, so cast first"


def _accumulate(p: TileProgram, op: t.Accumulate) -> Demand:
    yield from _alike((op.acc,), (op.out,))
    yield op.acc.dtype == op.value.dtype, f"{op.value.label} is {op.value.dtype}, its accumulator {op.acc.dtype}"


def _dot(p: TileProgram, op: t.Dot) -> Demand:
    sides, (left, right) = f"{op.left.axes} and {op.right.axes}", (set(op.left.axes), set(op.right.axes))
    yield left & right == {op.axis} and len(left) == len(right) == 2, f"it multiplies [m, k] by [k, n], got {sides}"
    floats = op.left.dtype == op.right.dtype and is_float(op.left.dtype)
    yield floats, f"it multiplies floats of one dtype, got {op.left.dtype} and {op.right.dtype}"
    yield from _alike((op.acc or op.out,), (op.out,))
    yield op.out.axes[0] in left, f"its left operand must vary over {op.out.axes[0]}"


def _halves(p: TileProgram, op: t.Halves) -> Demand:
    twice = p.axis(op.axis).of is not None and op.axis in op.value.axes
    yield twice, f"{op.value.label} has no halves along {op.axis}"


def _top_k(p: TileProgram, op: t.TopK) -> Demand:
    yield op.keys.dtype == "int32", "keys are int32"


def _access(p: TileProgram, at: t.Access, *others: t.Value) -> Demand:
    """An access, and values (its mask is one) that vary only along axes its index runs along."""
    param = p.param(at.tensor)
    fits = len(at.index) == len(param.axes) and len(at.wide) in (0, len(param.axes))
    yield fits, f"{param.name} has {len(param.axes)} dimensions, the index {len(at.index)}"
    for v in at.mask:
        yield v.dtype == "bool", f"the mask is {v.dtype}; it must be bool"
    for v in (v for i in at.index for v in i.values):
        yield v.dtype in ("int32", "int64"), f"the index {v.label} is {v.dtype}; it must be an integer"
    extra = {a for v in others for a in v.axes} - at.axes
    yield not extra, f"the value or the mask varies over {', '.join(sorted(extra))}, the index does not"


def _load(p: TileProgram, op: t.Load) -> Demand:
    yield from _access(p, op.at)


def _store(p: TileProgram, op: t.Store) -> Demand:
    param = p.param(op.at.tensor)
    yield op.value.dtype == param.dtype, f"{param.name} is {param.dtype}, the value {op.value.dtype}; cast it"
    yield from _access(p, op.at, op.value, *op.at.mask)


def _interleaved(p: TileProgram, op: t.Deinterleave | t.Interleave) -> Demand:
    wide, narrow = (op.value, op.outs) if isinstance(op, t.Deinterleave) else (op.out, op.values)
    yield from _alike(*((v,) for v in narrow))
    yield wide.axes[-1:] == (op.axis,), f"{op.axis} is not the last axis of {wide.label}"
    into = op.into if isinstance(op, t.Deinterleave) else op.by
    fits = p.axis(op.axis).block == len(narrow) * p.axis(into).block
    yield fits, f"{len(narrow)} blocks along {into} have not as many elements as one along {op.axis}"


def _reduced(p: TileProgram, op: t.AllReduce) -> Demand:
    yield from _mailed(p, op.at, op.value)
    dtype = p.param(op.at.tensor).dtype
    same = is_float(op.value.dtype) and op.value.dtype == dtype
    yield same, f"{op.at.tensor} has rows of {dtype}, the value is {op.value.dtype}; it must be of that, a float"


def _packet(p: TileProgram, op: t.Packet) -> Demand:
    yield op.epoch.dtype == "int32", f"the epoch is {op.epoch.dtype}; it must be int32"
    yield (op.way.dtype, op.way.axes) == ("int64", ()), f"the way is {op.way}; it must be one address"
    values = op.values if isinstance(op, t.Send) else (*op.own, *op.outs)
    yield from _alike(*((v,) for v in values))
    for v in values:
        yield v.dtype == "int32", f"{v.label} is {v.dtype}; packets take 32 bits, as int32"
    if isinstance(op, t.Receive):
        yield len(op.own) == len(op.outs), f"{len(op.outs)} values come and {len(op.own)} were sent; it must be as many"
    yield from _mailed(p, op.at, values[0])


def _mailed(p: TileProgram, at: t.Access, value: t.Value) -> Demand:
    """An access to a mailbox, and a value that varies along what its index runs along."""
    yield isinstance(p.param(at.tensor).layout, Mailbox), f"{at.tensor} is no mailbox"
    yield set(value.axes) == at.axes, f"the value varies over {value.axes}, the index over {p.ordered(at.axes)}"
    yield from _access(p, at, value, *at.mask)


def _prefetch(p: TileProgram, op: t.Prefetch) -> Demand:
    param = p.param(op.at.tensor)
    lines, rest = divmod(op.size * itemsize(param.dtype), t.LINE)
    whole = not rest and lines >= 1 and not lines & (lines - 1)
    yield whole, f"{op.size} elements of {param.dtype} are no power of two of memory lines"
    strided = isinstance(param.layout, Strided) and op.along in range(len(param.axes))
    yield strided, f"{param.name} has no strided dimension {op.along}"
    unit = param.strided.strides[op.along] == "unit"
    yield unit, f"the elements of {param.name} do not lie side by side along dimension {op.along}"
    one = not any(v.axes for v in op.at.index[op.along].values)
    yield one, "it begins at a block of elements, which must be one number"
    yield from _access(p, op.at, *op.at.mask)


def _loop(p: TileProgram, op: t.Loop) -> Demand:
    counted = len(op.vars) == len(op.over) and all(isinstance(a, str) or a >= 1 for a in op.over)
    yield counted, f"it goes over {op.over} with {len(op.vars)} variables"
    ends = op.end is None or ((op.end.dtype, op.end.axes) == ("int32", ()) and len(op.over) == 1 and not op.unroll)
    yield ends, f"it ends at {op.end}, which must be one int32, of a loop over one axis that is not unrolled"
    yield from _alike(op.carries, op.inits, op.yields, op.outs)


def _alike(*groups: tuple[t.Value, ...]) -> Demand:
    """Values that stand for each other."""
    yield len({len(group) for group in groups}) == 1, "carries, inits, yields and outs differ in number"
    for values in zip(*groups, strict=True):
        same = len({(v.dtype, v.axes) for v in values}) == 1
        yield same, f"{', '.join(map(str, values))} must be of one dtype and shape"


#: What is asked of an operation's operands.
DEMANDS: dict[type, Callable[[TileProgram, Any], Demand]] = {
    t.Unary: _unary,
    t.Binary: _binary,
    t.Where: _where,
    t.Bitcast: _bitcast,
    t.Along: _along,
    t.Reduce: _reduce,
    t.Scan: _reduce,
    t.Accumulate: _accumulate,
    t.Dot: _dot,
    t.Halves: _halves,
    t.Sides: lambda p, op: iter([(p.axis(op.axis).of is not None, f"{op.axis} is no axis twice, so it has no sides")]),
    t.Deinterleave: _interleaved,
    t.Interleave: _interleaved,
    t.TopK: _top_k,
    t.Load: _load,
    t.Store: _store,
    t.Prefetch: _prefetch,
    t.AllReduce: _reduced,
    t.Send: _packet,
    t.Receive: _packet,
    t.Loop: _loop,
    t.AtEnd: lambda p, op: _alike(op.yields, op.otherwise, op.outs),
}
