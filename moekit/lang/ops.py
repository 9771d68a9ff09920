"""The functions a declaration is written with: primitives, and the composites made of them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from moekit.errors import DeclarationError, DtypeError, ShapeError
from moekit.lang.dtypes import ALL, LARGEST, STORED, int_of_width, is_float, itemsize, promote, widened
from moekit.lang.elementwise import ELEMENTWISE, IDENTITY
from moekit.lang.graph import Index, end_of
from moekit.lang.trace import Value, as_value, constant, convert, current, elementwise


def _known(dtype: str) -> str:
    """The name of a dtype of the language; DtypeError for any other."""
    if dtype not in ALL:
        raise DtypeError(f"{current().name}: {dtype!r} is no dtype of the language; it has {', '.join(ALL)}")
    return dtype


def traced(x, word: str) -> Value:
    """What only a traced value can be given; DeclarationError for a Python number."""
    if not isinstance(x, Value):
        raise DeclarationError(f"{current().name}: {word} takes a traced value, got {x!r}; declare it as an operand, or f32 it")
    return x


def cast(x, dtype: str) -> Value:
    """`x` in `dtype`. Narrowing is a rounding point (to nearest, ties to even), and no compiler may drop it.

    What exceeds the largest number of a dtype without infinities (±448 in float8_e4m3fn) becomes that, NaN stays: a choice
    before the rounding, as libraries and GPUs differ in what overflows.
    """
    value = as_value(x, _known(dtype))
    if dtype in LARGEST and value.dtype != dtype:
        value = minimum(maximum(convert(value, "float32"), -LARGEST[dtype]), LARGEST[dtype])
    return convert(value, dtype)


def f32(x) -> Value:
    """`x` in float32."""
    return cast(x, "float32")


def bitcast(x: Value, dtype: str) -> Value:
    """The bits of `x` read as a dtype of the same width."""
    if itemsize(traced(x, "bitcast").dtype) != itemsize(_known(dtype)):
        raise DtypeError(f"{x.builder.name}: bitcast from {x.dtype} to {dtype} changes the width")
    return x if x.dtype == dtype else x.builder.add("bitcast", (x.node,), (), dtype)


def function(op: str) -> Callable[..., Value]:
    """What declarations call for an operation of the table."""
    row = ELEMENTWISE[op]
    call = (lambda x: elementwise(op, x)) if row.arity == 1 else (lambda a, b: elementwise(op, a, b))
    call.__name__, call.__qualname__, call.__doc__ = op, op, row.about
    return call


exp, log, sqrt, rsqrt = function("exp"), function("log"), function("sqrt"), function("rsqrt")
sin, cos = function("sin"), function("cos")
abs, sigmoid, softplus = function("abs"), function("sigmoid"), function("softplus")
maximum, minimum = function("maximum"), function("minimum")


def isnan(x: Value) -> Value:
    """Whether `x` is NaN."""
    return elementwise("ne", x, x)


def where(condition: Value, a, b) -> Value:
    """`a` where `condition` holds, else `b`. Two values of one dtype keep it, but for one that is only stored: float32 then."""
    if not isinstance(condition, Value) or condition.dtype != "bool":
        raise DtypeError(f"{current().name}: where needs a bool condition, got {condition!r}")
    a = as_value(a, b.dtype if isinstance(b, Value) else "float32")
    b = as_value(b, a.dtype)
    if a.dtype != b.dtype or a.dtype in STORED:
        dtype = promote(a.dtype, b.dtype)
        a, b = convert(a, dtype), convert(b, dtype)
    return a.builder.add("where", (condition.node, a.node, b.node), (), a.dtype)


def names_of(over: str) -> list[str]:
    names = over.split()
    if not names:
        raise DeclarationError(f"{current().name}: over= names no axis")
    return names


def summable(x: Value) -> Value:
    """Floats in float32, bools and narrow integers in int32, wider ones as they are."""
    return convert(x, "int32" if x.dtype in ("bool", "int8", "int16") else widened(x.dtype))


def _first(x: Value, over: str, upto: Value | int | None, kind: str) -> Value:
    """`x` along the first `upto` elements of one axis; past them what a sum, maximum or minimum begins from.

    That is a choice and no product, so what stands past them does not matter, NaN or not. A loop over the axis ends with the
    last block that has such an element, where its programs have one length each (`compile/schedule/facts.py`).
    """
    if upto is None:
        return x
    if len(names_of(over)) != 1:
        raise DeclarationError(
            f"{current().name}: upto= counts elements of one axis, but over={over!r} names several; fold one by one"
        )
    n = as_value(upto, "int32")
    if is_float(n.dtype) or n.dtype == "bool" or over in n.axes:
        raise DeclarationError(f"{current().name}: upto= needs an integer that does not vary over {over}, got {n!r}")
    if n.dtype == "int64":
        n = minimum(maximum(n, 0), extent(over))
    n = cast(n, "int32")
    return where(iota(over) < n, x, constant(IDENTITY[kind, widened(x.dtype)], x.dtype))


def _reduce(kind: str, x, over: str, upto: Value | int | None = None) -> Value:
    x = _first(summable(as_value(x, "float32")), over, upto, kind)
    builder = x.builder
    for axis in names_of(over):
        size = builder.axis_size(axis)
        if kind != "sum" and size == 0 and end_of(builder.nodes, x.node, axis, kind) is None:
            raise ShapeError(f"{builder.name}: {kind} over {axis} needs at least one element, got {axis} = 0")
        if axis in x.axes:
            x = builder.add("reduce", (x.node,), (("kind", kind), ("axis", axis)), x.dtype)
        elif kind == "sum":
            x = x * extent(axis)
    return x


def sum(x, over: str, upto: Value | int | None = None) -> Value:
    """Sum over the named axes (`over="H"` or `"K H"`), in float32 for floats. `upto`: of the first so many elements alone."""
    return _reduce("sum", x, over, upto)


def max(x, over: str, upto: Value | int | None = None) -> Value:
    """Maximum over the named axes; NaN if any element is NaN. `upto`: of the first so many elements alone."""
    return _reduce("max", x, over, upto)


def min(x, over: str, upto: Value | int | None = None) -> Value:
    """Minimum over the named axes; NaN if any element is NaN. `upto`: of the first so many elements alone."""
    return _reduce("min", x, over, upto)


def mean(x, over: str) -> Value:
    """Arithmetic mean over the named axes, in float32."""
    builder, axes = current(), names_of(over)
    known = prod(n for a in axes if (n := builder.axis_size(a)) is not None)
    counts = [extent(a) for a in axes if builder.axis_size(a) is None]
    counts += [constant(known, "int32" if known < 2**31 else "int64")] if known != 1 or not counts else []
    total, count = f32(sum(x, over)), f32(counts[0])
    for other in counts[1:]:  # in float32, as a product of sizes can pass 32 bits
        count = count * f32(other)
    return total / count


def cumsum(x, over: str) -> Value:
    """Running sum along the named axes, the last one's elements following each other; inclusive, in float32 for floats."""
    x = summable(as_value(x, "float32"))
    *outer, axis = names_of(over)
    if axis not in x.axes:
        raise DeclarationError(f"{x.builder.name}: cumsum over {axis!r}, but the value varies over {x.axes}")
    running = x.builder.add("cumsum", (x.node,), (("axis", axis),), x.dtype)
    if not outer:
        return running
    row = sum(x, axis)
    return running + (cumsum(row, " ".join(outer)) - row)


def _computed(x: Value, like: str = "bfloat16") -> Value:
    """A value of a dtype that is only stored in the dtype `like`, or in bfloat16 where that is one of those too."""
    return convert(x, "bfloat16" if like in STORED else like) if x.dtype in STORED else x


def contract(a: Value, b: Value, over: str, upto: Value | int | None = None) -> Value:
    """Sum over the named axes of a·b, accumulated in float32; float32 operands are never rounded to TF32.

    An operand in float8 is taken in the other's dtype, into which it fits. Two of them are multiplied as they are: on a GPU by
    the matrix unit's instructions for them, which add up in fewer bits than float32 has (docs/numerics.md). `upto`: of the
    first so many elements alone.
    """
    a, b = as_value(a, "float32"), as_value(b, "float32")
    if not (is_float(a.dtype) and is_float(b.dtype)):
        raise DtypeError(f"{a.builder.name}: contract needs floats, got {a.dtype} and {b.dtype}; cast first")
    if a.dtype != b.dtype or upto is not None:  # a choice of whether there is an element is of no float8
        a, b = _computed(a, b.dtype), _computed(b, a.dtype)
    if a.dtype != b.dtype:
        a, b = convert(a, "float32"), convert(b, "float32")
    *rest, axis = names_of(over)
    for name in (*rest, axis):
        if name not in a.axes or name not in b.axes:
            raise DeclarationError(f"{a.builder.name}: contract over {name!r} needs it in both operands, got {a} and {b}")
    a, b = _first(a, over, upto, "sum"), _first(b, over, upto, "sum")
    out = a.builder.add("contract", (a.node, b.node), (("axis", axis),), "float32")
    return sum(out, " ".join(rest)) if rest else out


def softmax_sum(scores: Value, values: Value, over: str, upto: Value | int | None = None) -> Value:
    """Sum over one axis of softmax(scores)·values, in float32; zero where every score is -inf, or there is none.

    `upto`: of the first so many elements alone. Products are of the values' dtype: where that is narrow the weights exp(score -
    largest) are rounded to it, against the largest score so far, which the order of sums says.
    """
    scores, values = as_value(scores, "float32"), as_value(values, "float32")
    for x in (scores, values):
        if not is_float(x.dtype) or over not in x.axes:
            raise DeclarationError(f"{x.builder.name}: softmax_sum over {over!r} needs floats that vary over it, got {x}")
    scores, values = _first(f32(scores), over, upto, "max"), _first(_computed(values), over, upto, "sum")
    top = scores.builder.add("reduce", (scores.node,), (("kind", "max"), ("axis", over)), "float32")

    def weighed(x: Value) -> Value:
        """Σ exp(score - top)·x; compilers make it and `top` in one go."""
        attrs = (("axis", over), ("weights", x.dtype))
        return scores.builder.add("exp_sum", (scores.node, x.node, top.node), attrs, "float32")

    total = weighed(constant(1.0, "float32"))
    nothing = total == 0.0
    return where(nothing, 0.0, weighed(values) / where(nothing, 1.0, total))


def top_k(x: Value, k: int, over: str, into: str) -> tuple[Value, Value]:
    """The k largest along axis `over` as (values, int32 ids) along the new axis `into`, best first.

    Numbers come before NaN; equal values (-0 equals +0) go by lower index; ids are unique and in range for any input.
    """
    builder = traced(x, "top_k").builder
    size = builder.axis_size(over)
    if not is_float(x.dtype):
        raise DtypeError(f"{builder.name}: top_k ranks floats, got {x.dtype}; cast first")
    x = _computed(x)
    if size is None:
        raise DeclarationError(f"{builder.name}: top_k over the dynamic axis {over!r} cannot be held in one block")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= size:
        raise ShapeError(f"{builder.name}: k = {k!r}, but {over} has {size} elements; pass 1 <= k <= {size}")
    if over not in x.axes:
        raise DeclarationError(f"{builder.name}: top_k over {over!r}, but the value varies over {x.axes}")
    builder.new_axis(into, k)
    keys, bits = ordered_bits(x)
    attrs = (("axis", over), ("into", into), ("k", k), ("bits", bits))
    best = builder.add("top_k", (keys.node,), (*attrs, ("part", "keys")), "int32")
    ids = builder.add("top_k", (keys.node,), (*attrs, ("part", "ids")), "int32")
    values = from_ordered_bits(best, x.dtype)
    picked = (values.node, x.node, ids.node)
    return builder.add("pick", picked, (("axis", over), ("into", into)), x.dtype), ids


def iota(axis: str) -> Value:
    """0, 1, 2, … along `axis`, int32."""
    current().axis_size(axis)
    return current().add("iota", (), (("index", Index.of(axis)),), "int32")


def size(axis: str) -> int:
    """The size of a static axis, as a Python number."""
    n = current().axis_size(axis)
    if n is None:
        raise DeclarationError(f"{current().name}: axis {axis!r} is dynamic; use extent({axis!r})")
    return n


def extent(axis: str) -> Value:
    """The size of an axis as an int32 value: a constant, or a run-time argument if the axis is dynamic."""
    n = current().axis_size(axis)
    return constant(n, "int32") if n is not None else current().add("extent", (), (("axis", axis),), "int32")


def silu(x) -> Value:
    """x·sigmoid(x) in float32."""
    x = f32(x)
    return x * sigmoid(x)


def softmax(x, over: str) -> Value:
    """exp(x - max)/sum over one axis, in float32."""
    x = f32(x)
    e = exp(x - max(x, over))
    return e / sum(e, over)


def argmax(x, over: str) -> Value:
    """Index of the first maximum along one axis, int32; the first NaN if there is one."""
    return _arg(max(x, over), x, over)


def argmin(x, over: str) -> Value:
    """Index of the first minimum along one axis, int32; the first NaN if there is one."""
    return _arg(min(x, over), x, over)


def _arg(best: Value, x, over: str) -> Value:
    x = as_value(x, "float32")
    hit = (x == best) | isnan(x)
    return min(where(hit, iota(over), 2**31 - 1), over)


LOWEST = -(2**31)


def ordered_bits(x: Value) -> tuple[Value, int]:
    """An int32 that sorts as the float `x` does, and how many of its high bits are used: -0 equals +0, NaN below every number.

    The smallest integer is never used: it marks padding. IEEE's sign and magnitude become two's complement by a subtraction.
    """
    width = 8 * itemsize(x.dtype)
    bits = cast(bitcast(x, int_of_width(x.dtype)), "int32")
    bits = bits << 32 - width if width < 32 else bits
    return where(isnan(x), LOWEST + 2 ** (32 - width), where(bits >= 0, bits, LOWEST - bits)), width


def from_ordered_bits(key: Value, dtype: str) -> Value:
    """The float of `dtype` whose `ordered_bits` are `key`; NaN comes back as a quiet NaN, -0 as +0."""
    unused = 32 - 8 * itemsize(dtype)
    bits = where(key == LOWEST + 2**unused, 2**31 - 1, where(key >= 0, key, LOWEST - key))
    return bitcast(cast(bits >> unused if unused else bits, int_of_width(dtype)), dtype)
