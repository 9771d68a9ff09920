"""How an error passes through each operation of the language: one rule per op of the Graph, as a table.

A rule takes the evaluation, the node and the bounds of its operands, and returns the bound of the result.
Arrays have a dimension for every axis of the graph, of size 1 where they do not vary. What an error is:
`moekit.testing.bounds`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moekit.lang import graph as g
from moekit.lang.dtypes import MANTISSA, MIN_EXPONENT, STORED, is_float, numpy_dtype, round_to
from moekit.lang.elementwise import IDENTITY
from moekit.lang.graph import COMPARE, Index, Node
from moekit.testing.constants import DEFAULT
from moekit.testing.evaluation import LARGEST, TINY, UNIT, Bound, Evaluation
from moekit.testing.ranking import ranked, unsure

REACH = DEFAULT  # how many times the estimated noise may carry a value over a tie: as often as it may be exceeded at all

DEEP = 32  # products of float8 that a matrix unit's instruction adds up
# own error of one operation, in UNITs of its result; room for what GPUs approximate (division, ex2, lg2)
OWN = {"add": 1, "sub": 1, "mul": 1, "div": 4, "sqrt": 4, "rsqrt": 4, "log": 4, "sin": 4, "cos": 4}


def _made(value, parts, own, exact=None, product=False) -> Bound:
    """A float32 result from `parts` = (|∂f/∂x|, bound of x) and its own error in UNITs."""
    noise = own * UNIT * np.abs(value) + (TINY if np.any(own) else 0.0)
    flips = np.zeros(())
    for slope, part in parts:
        noise = noise + _times(slope, part.noise)
        flips = flips + _times(slope, part.flips)
    return Bound(value, noise, flips, exact, product)


def _times(slope, error):
    """slope·error where no error is no error, however steep."""
    return np.where(error == 0, 0.0, slope * error)


def _known(*args: Bound) -> bool:
    return all(a.exact is not None for a in args)


def _read(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    array = ev.inputs[node.attr("tensor")]
    index, keep = [], np.ones((1,) * len(ev.order), bool)
    for dim, entry in enumerate(node.attr("index")):
        at = _index(ev, entry, args)
        keep = keep & (at >= 0) & (at < array.shape[dim])
        index.append(np.clip(at, 0, max(0, array.shape[dim] - 1)))
    shape = np.broadcast_shapes(keep.shape, *(i.shape for i in index))
    got = np.zeros(shape, array.dtype) if 0 in array.shape else np.broadcast_to(array[tuple(index)], shape)
    got = np.where(keep, got, np.zeros((), array.dtype))
    zero = np.zeros(got.shape)
    if not is_float(node.dtype):
        return Bound(got, zero, zero, got)
    got = got.astype(np.float64)
    return Bound(got, zero, np.where(np.abs(got) < TINY, np.abs(got), 0.0), got)


def _index(ev: Evaluation, index: Index, args: list[Bound]) -> np.ndarray:
    """The elements that an index says."""
    found = np.full((1,) * len(ev.order), index.start, np.int64)
    for term, step in index.terms:
        along = isinstance(term, str)
        found = found + step * (ev.along(np.arange(ev.sizes[term]), term) if along else args[term].value.astype(np.int64))
    return found


def _iota(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    return _integer(_index(ev, node.attr("index"), args).astype(np.int32))


def _extent(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    return _integer(ev.full(ev.sizes[node.attr("axis")], "int32"))


def _integer(value: np.ndarray, *args: Bound) -> Bound:
    """An integer result; errors ride along, so that a float read as bits and back keeps its own."""
    noise = functools.reduce(np.maximum, (a.noise for a in args), np.zeros(()))
    flips = functools.reduce(np.maximum, (a.flips for a in args), np.zeros(()))
    return Bound(value, noise, flips, value if _known(*args) else None)


def _const(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    value = ev.full(node.attr("value"), node.dtype)
    if not is_float(node.dtype):
        return _integer(value)
    exact, declared = value.astype(np.float64), ev.full(float(node.attr("value")), "float64")
    return Bound(declared, np.abs(exact - declared), np.zeros(value.shape), exact)


def _binary(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    a, b = args
    if node.op in COMPARE:
        return _integer(FLOAT[node.op](a.value, b.value))
    if not is_float(node.dtype):
        return _integer(INTEGER[node.op](a.value, b.value).astype(numpy_dtype(node.dtype)), a, b)
    value = FLOAT[node.op](a.value, b.value)
    if node.op in ("maximum", "minimum"):
        return _larger(FLOAT[node.op], a, b)
    rounded_once = node.op == "mul" or (node.op in ("add", "sub") and not (a.product or b.product))
    exact = round_to(FLOAT[node.op](a.exact, b.exact), "float32") if rounded_once and _known(a, b) else None
    slopes = {
        "add": lambda: (1.0, 1.0),
        "sub": lambda: (1.0, 1.0),
        "mul": lambda: (_largest(b), np.abs(a.value)),
        "div": lambda: (1 / _nearest(b), np.abs(value) / _nearest(b)),
    }[node.op]()
    made = _made(value, zip(slopes, args, strict=True), OWN[node.op], exact, node.op == "mul")
    if node.op in ("add", "sub") and not (a.terms is None and b.terms is None):
        terms = sum(_tame(x.value) if x.terms is None else x.terms for x in (a, b))
        return _unknown(replace(made, terms=terms), terms > LARGEST)
    if node.op != "mul" or np.isfinite(value).all():
        return made
    vanishing = [np.isinf(x.value) & (y.value != 0) & (np.abs(y.value) < TINY) for x, y in ((a, b), (b, a))]
    return _unknown(made, vanishing[0] | vanishing[1])  # infinity times what may read as zero


def _largest(x: Bound) -> np.ndarray:
    """|x| at its largest: where a subnormal reads as zero an error may be all of a value, so that errors multiply, too."""
    return np.abs(x.value) + x.error()


def _nearest(x: Bound) -> np.ndarray:
    """|x| at its smallest but for noise: what a quotient is divided by where a subnormal divisor reads as zero."""
    return np.maximum(np.abs(x.value) - x.flips, 0.0)


def _unknown(b: Bound, where: np.ndarray) -> Bound:
    """The bound with nothing known where float32 may overflow, or meet a zero, on the way to a value that float64 has."""
    return replace(b, value=np.where(where, 0.0, b.value), noise=np.where(where, np.inf, b.noise))


def _larger(f: Callable, a: Bound, b: Bound) -> Bound:
    """maximum or minimum: the errors of the one taken, of both where they are close."""
    exact = f(a.exact, b.exact) if _known(a, b) else None
    value = f(a.value, b.value)
    clear = np.abs(a.value - b.value) > REACH * (a.noise + b.noise) + a.flips + b.flips
    pick = lambda x, y: np.where(clear, np.where(value == a.value, x, y), np.maximum(x, y))  # noqa: E731
    return Bound(value, pick(a.noise, b.noise), pick(a.flips, b.flips), exact, a.product or b.product)


def _unary(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (x,) = args
    if not is_float(node.dtype):
        return _integer({"not": np.invert, "neg": np.negative, "abs": np.abs}[node.op](x.value), x)
    if node.op in ("neg", "abs"):
        f = np.negative if node.op == "neg" else np.abs
        return Bound(f(x.value), x.noise, x.flips, None if x.exact is None else f(x.exact), x.product)
    v = UNARY[node.op](x.value)
    slope, own = {
        "exp": lambda: (v, 4 + np.abs(np.nan_to_num(x.value, nan=0.0, posinf=0.0, neginf=0.0))),
        "log": lambda: (1 / np.abs(x.value), OWN["log"]),
        "sqrt": lambda: (0.5 / v, OWN["sqrt"]),
        "rsqrt": lambda: (0.5 * v / np.abs(x.value), OWN["rsqrt"]),
        "sin": lambda: (1.0, OWN["sin"]),
        "cos": lambda: (1.0, OWN["cos"]),
        "softplus": lambda: (1 - np.exp(-v), 8 + np.minimum(np.abs(x.value), 128)),
        "sigmoid": lambda: (v * (1 - v), 6 + (4 + np.minimum(np.abs(x.value), 128)) * (1 - v)),
    }[node.op]()
    made = _made(v, [(np.nan_to_num(slope, nan=0.0, posinf=np.inf), x)], own)
    if node.op in ("sin", "cos"):  # what float32 made infinite has none
        return _unknown(made, np.isfinite(x.value) & (np.abs(x.value) + x.error(REACH) > LARGEST))
    return replace(made, flips=np.maximum(made.flips, _moved(UNARY[node.op], v, x))) if np.any(x.flips) else made


def _moved(f: Callable, v: np.ndarray, x: Bound) -> np.ndarray:
    """How far flips move a monotone function: near a pole, or the end of its domain, its slope does not say."""
    ends = [f(np.where(x.value > 0, np.maximum(x.value + side * x.flips, 0), x.value + side * x.flips)) for side in (-1, 1)]
    return np.where(np.isfinite(v), np.nan_to_num(np.maximum(*(np.abs(e - v) for e in ends)), nan=0.0, posinf=np.inf), 0.0)


def _cast(ev: Evaluation, node: Node, args: list[Bound]) -> Bound | tuple[Bound, Bound]:
    """A widening cast is nothing; a narrowing one gives the bound before it (for an output) and after it."""
    (x,) = args
    source = x.value.dtype
    if node.dtype == "bool" or (not is_float(node.dtype) and source.kind != "f"):
        return _integer(x.value.astype(numpy_dtype(node.dtype)), x)
    if not is_float(node.dtype):
        return _integer(np.nan_to_num(x.value, nan=0.0).astype(numpy_dtype(node.dtype)))
    if source.kind != "f":
        value = x.value.astype(np.float64)
        exact = round_to(value, node.dtype)
        return Bound(value, np.abs(exact - value), np.zeros(value.shape), exact)
    if node.dtype == "float32":
        return x
    exact = None if x.exact is None else round_to(x.exact, node.dtype)
    value, reach = round_to(x.value, node.dtype), REACH * x.noise + x.flips
    if exact is not None:
        reach = x.flips  # nothing but operands that read as zero moves it
    ends = [round_to(x.value + reach, node.dtype), round_to(x.value - reach, node.dtype)]
    ends += [exact] if exact is not None else []
    flips = functools.reduce(np.maximum, (np.where(e == value, 0.0, np.abs(e - value)) for e in ends))
    smallest = 2.0 ** MIN_EXPONENT[node.dtype] if node.dtype not in STORED else 0.0  # none of float8's reads as zero
    zeroed = (np.abs(value) < smallest) | (np.abs(x.value) < TINY)  # it may read as zero after the rounding, or before
    flips = np.maximum(flips, np.where(zeroed, np.abs(value), 0.0))
    return replace(x, exact=exact), Bound(value, np.zeros(()), flips, exact)


def _bitcast(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (x,) = args
    if x.value.dtype.kind == "f":
        source = ev.graph.nodes[node.args[0]].dtype
        return _integer(x.value.astype(numpy_dtype(source)).view(numpy_dtype(node.dtype)), x)
    value = np.ascontiguousarray(x.value).view(numpy_dtype(node.dtype))
    if not is_float(node.dtype):
        return _integer(value, x)
    value = value.astype(np.float64)
    return Bound(value, x.noise, x.flips, value if _known(x) else None)


def _where(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    c, a, b = args
    pick = lambda x, y: np.where(c.value, x, y)  # noqa: E731
    exact = pick(a.exact, b.exact) if _known(a, b) else None
    return Bound(pick(a.value, b.value), pick(a.noise, b.noise), pick(a.flips, b.flips), exact, a.product or b.product)


def _reduce(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (x,), axis, n = args, ev.order[node.attr("axis")], ev.sizes[node.attr("axis")]
    more = {"initial": IDENTITY[node.attr("kind"), node.dtype]} if n == 0 else {}  # of no elements
    over = functools.partial({"sum": np.sum, "max": np.max, "min": np.min}[node.attr("kind")], axis=axis, keepdims=True, **more)
    if is_float(node.dtype) and node.attr("kind") == "sum":
        total = functools.partial(np.sum, axis=axis, keepdims=True)
        noise = total(x.noise) + _added(n, total(np.abs(x.value)), total(x.value))
        return _unknown(Bound(total(x.value), noise, total(x.flips)), total(_tame(x.value)) > LARGEST)
    worst = functools.partial(np.max, axis=axis, keepdims=True, initial=0.0)
    made = Bound(over(x.value), worst(x.noise), worst(x.flips), over(x.exact) if _known(x) else None)
    return made if is_float(node.dtype) else _integer(made.value.astype(numpy_dtype(node.dtype)), made)


def _tame(v: np.ndarray) -> np.ndarray:
    """Magnitudes without infinities: where these add up to more than float32 holds, the order of addition decides."""
    return np.where(np.isfinite(v), np.abs(v), 0.0)


def _growth(n: int) -> float:
    """UNITs of Σ|x| that a sum of n terms may lose: the depth of a tree of additions."""
    return 1 + np.log2(max(1, n))


def _added(n: int, magnitude: np.ndarray, total: np.ndarray) -> np.ndarray:
    """What n terms may lose by being added up, when Σ|x| is `magnitude` and Σx is `total`.

    A tree of additions loses at most its depth times Σ|x|. One after another, as numpy adds along any axis but the last and a
    schedule with small blocks does, they lose at most half an ulp of every partial sum, which for terms of one sign is
    n/2 · |Σx| (equal terms, all rounded the same way, come to half of that; terms of both signs cancel in their partial sums
    as in their total). The constant of the contract multiplies by four: hence n/8.
    """
    return UNIT * np.maximum(_growth(n) * magnitude, n / 8 * np.abs(total)) + n * TINY


def _cut_off(n: int) -> float:
    """What a matrix unit may lose of Σ|x| over n products of float8, a quarter of it: the contract's constant is four.

    One instruction of compute capability 9.0 brings 32 products and the sum so far to the exponent of the largest, keeps 13
    bits behind it of each, cut off, and as many of their sum. So each of 33 terms, and their sum, loses less than 2^-13 of
    the largest, and none is larger than Σ|x|.
    """
    return -(-n // DEEP) * (DEEP + 2) * 2.0**-13 / 4


def _cumsum(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (x,), n = args, ev.sizes[node.attr("axis")]
    run = functools.partial(np.cumsum, axis=ev.order[node.attr("axis")])
    made = Bound(run(x.value), run(x.noise), run(x.flips), x.exact)
    if not is_float(node.dtype):
        return _integer(made.value.astype(numpy_dtype(node.dtype)), made)
    in_order = run(np.abs(made.value)) / 4  # half an ulp of every partial sum, as in `_added`
    own = UNIT * np.maximum(_growth(n) * run(np.abs(x.value)), in_order) + n * TINY
    return _unknown(replace(made, noise=made.noise + own, exact=None), run(_tame(x.value)) > LARGEST)


def _contract(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (a, b), n = args, ev.sizes[node.attr("axis")]
    dot = functools.partial(_dot, axis=ev.order[node.attr("axis")])
    size_a, size_b, largest_b = np.abs(a.value), np.abs(b.value), _largest(b)
    value, magnitude = dot(a.value, b.value), dot(size_a, size_b)
    noise = dot(a.noise, largest_b) + dot(size_a, b.noise) + _added(n, magnitude, value)
    if ev.graph.nodes[node.args[0]].dtype in STORED:
        noise = noise + _cut_off(n) * magnitude
    terms = dot(_tame(a.value), _tame(b.value))
    made = Bound(value, noise, dot(a.flips, largest_b) + dot(size_a, b.flips), terms=terms)
    return _unknown(made, terms > LARGEST)


def _exp_sum(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    """Narrow weights are rounded against a maximum that the order of sums says: each may be off by half an ulp of its own."""
    (s, v, top), n, dtype = args, ev.sizes[node.attr("axis")], node.attr("weights")
    dot = functools.partial(_dot, axis=ev.order[node.attr("axis")])
    away = s.value - np.where(np.isneginf(top.value), 0.0, top.value)
    weights = np.exp(away)
    noise = weights * (s.noise + top.noise + (8 + np.abs(np.nan_to_num(away, nan=0.0, neginf=0.0))) * UNIT) + TINY
    flips = weights * (s.flips + top.flips)
    if dtype != "float32":
        flips = flips + np.where(weights < 2.0 ** MIN_EXPONENT[dtype], weights, weights * 2.0 ** -(1 + MANTISSA[dtype]))
    size, largest, value = np.abs(v.value), _largest(v), dot(weights, v.value)
    made = Bound(value, dot(noise, largest) + dot(weights, v.noise) + _added(n, dot(weights, size), value),
                 dot(flips, largest) + dot(weights, v.flips))  # fmt: skip
    least = TINY if dtype == "float32" else max(TINY, 2.0 ** (MIN_EXPONENT[dtype] - MANTISSA[dtype]))
    vanishing = dot(((weights > 0) & (weights < least)).astype(float), np.isinf(v.value).astype(float)) > 0
    return _unknown(made, vanishing | (dot(_tame(weights), _tame(v.value)) > LARGEST))


def _dot(u: np.ndarray, v: np.ndarray, axis: int) -> np.ndarray:
    """Σ over dimension `axis` of u·v with numpy's broadcasting of the others."""
    kept = [[i for i, n in enumerate(x.shape) if n != 1 or i == axis] for x in (u, v)]
    out = sorted({*kept[0], *kept[1]} - {axis})
    flat = [x.reshape([x.shape[i] for i in k]) for x, k in zip((u, v), kept, strict=True)]
    product = np.einsum(flat[0], kept[0], flat[1], kept[1], out, optimize=True)
    sizes = dict(zip(out, product.shape, strict=True))
    return product.reshape([sizes.get(i, 1) for i in range(u.ndim)])


def _top_k(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    (keys,), axis, into = args, ev.order[node.attr("axis")], ev.order[node.attr("into")]
    ids = np.argsort(-keys.value.astype(np.int64), axis=axis, kind="stable")
    ids = np.take(ids, np.arange(node.attr("k")), axis=axis)
    if node.attr("part") == "ids":
        made = _integer(np.swapaxes(ids, axis, into).astype(np.int32))
        at = ranked(ev.graph, node.args[0])
        near = (
            unsure(keys.value, keys.error(REACH), ev.nodes[at].value, axis, node.attr("k"))
            if at is not None
            else np.zeros((1,) * len(ev.order), bool)
        )
        near = np.swapaxes(near, axis, into)
        return replace(made, noise=np.where(near, np.inf, 0.0), exact=None if near.any() else made.exact)
    return keys.each(lambda v: np.swapaxes(np.take_along_axis(v, ids, axis), axis, into))


def _pick(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    """The values that go with ids of a top_k, with the errors of the elements they are."""
    values, x, ids = args
    axis, into = ev.order[node.attr("axis")], ev.order[node.attr("into")]
    at = np.swapaxes(ids.value, axis, into).astype(np.int64)
    taken = x.each(lambda v: np.swapaxes(np.take_along_axis(np.broadcast_to(v, x.value.shape), at, axis), axis, into))
    most = np.swapaxes(np.max(np.broadcast_to(x.error(REACH), x.value.shape), axis=axis, keepdims=True), axis, into)
    flips = np.where(
        np.isinf(ids.noise), 3 * most, taken.flips
    )  # another element's, that is as near as its and this one's error
    return replace(values, noise=taken.noise, flips=flips)


def placed(ev: Evaluation, node: Node, at: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """`x` where indices `at` place it; zeros elsewhere."""
    places = dict(zip(node.attr("over"), at, strict=True))
    moved = {a: ev.along(np.arange(n), a) for a, n in ev.sizes.items() if a in node.axes and a not in places}
    index = [places.get(a, moved.get(a, np.zeros((1,) * len(ev.order), np.int64))) for a in ev.order]
    x, *index = np.broadcast_arrays(x, *index)
    out = np.zeros([n if a in node.axes else 1 for a, n in ev.sizes.items()], x.dtype)
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, out.shape, strict=True)])
    out[tuple(i[inside] for i in index)] = x[inside]
    return out


def _place(ev: Evaluation, node: Node, args: list[Bound]) -> Bound:
    """Every value with its errors at its place; what nothing is placed at is not looked at."""
    return args[0].each(functools.partial(placed, ev, node, [a.value for a in args[1:]]))


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, 0, np.abs(a) // np.abs(safe) * np.sign(a) * np.sign(safe))


FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "maximum": np.maximum, "minimum": np.minimum,
    "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
INTEGER = FLOAT | {
    "floordiv": _divided, "rem": lambda a, b: a - _divided(a, b) * b,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
UNARY = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}  # fmt: skip
ALONG = ("reduce", "cumsum", "contract", "exp_sum", "top_k")  # operations along one axis: their operands come at its full size
RULES: dict[str, Callable] = {
    "read": _read, "iota": _iota, "const": _const,
    "extent": _extent,
    "cast": _cast, "bitcast": _bitcast, "where": _where,
    "reduce": _reduce, "cumsum": _cumsum, "contract": _contract, "exp_sum": _exp_sum, "top_k": _top_k, "pick": _pick,
    "place": _place,
    **dict.fromkeys(g.UNARY, _unary),
    **dict.fromkeys(g.BINARY, _binary),
}  # fmt: skip
