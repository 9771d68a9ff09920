"""The heuristic's schedules for all numbers of rows, of declarations that are nobody's fusion: legal, and of one order."""

import pytest

from moekit.compile.dense import contiguous
from moekit.compile.heuristic import class_axis, heuristic, row_classes, tokens_class
from moekit.compile.order import order
from moekit.compile.plan import plan
from moekit.compile.schedule import legal
from moekit.lang import In, InOut, cast, contract, f32, fusion, halves, mean, put, rsqrt, silu, sum
from moekit.lang.arguments import example


@fusion(None, x=In("T D"), w=In("P D"))
def scaled(x, w):
    """A product and the norm of its left operand's rows."""
    return {"out": cast(contract(x, w, over="D") * rsqrt(mean(f32(x) * f32(x), over="D") + 1.0), x.dtype)}


@fusion(None, x=In("T D"), w=In("P D"))
def normed(x, w):
    """A norm before a product."""
    h = cast(f32(x) * rsqrt(mean(f32(x) * f32(x), over="D") + 1.0), x.dtype)
    return {"out": cast(contract(h, w, over="D"), x.dtype)}


@fusion(None, x=In("T D"), u=In("I D"), w=In("P I"))
def twice(x, u, w):
    """A product of a product."""
    h = cast(silu(contract(x, u, over="D")), x.dtype)
    return {"out": cast(contract(h, w, over="I"), x.dtype)}


@fusion(None, x=In("T D"), w=In("2*G P D"))
def planes(x, w):
    """Two products, apart along an axis that is not that of their columns."""
    a, b = halves(w, "G")
    return {"out": cast(silu(contract(x, a, over="D")) * contract(x, b, over="D"), x.dtype)}


@fusion(None, x=In("T D"), y=In("T P"))
def over_rows(x, y):
    """A product over the rows, as a share of its own sums."""
    s = contract(x, y, over="T")
    return {"out": s / sum(s, over="P")}


@fusion(None, x=In("T D"), w=In("P D"), ids=In("T", dtype=("int32", "int64")), pool=InOut("S P"))
def pooled(x, w, ids, pool):
    """The rows of a product at ids."""
    return {"pool": put(cast(contract(x, w, over="D"), pool.dtype), ids, over="S")}


@fusion(None, x=In("T V D"), ids=In("T", dtype=("int32", "int64")), pool=InOut("S V D"))
def kept(x, ids, pool):
    """Norms of short rows, put at ids."""
    return {"pool": put(cast(f32(x) * rsqrt(mean(f32(x) * f32(x), over="D") + 1.0), pool.dtype), ids, over="S")}


@fusion(None, x=In("T V D"))
def short(x):
    """Norms of short rows."""
    return {"out": cast(f32(x) * rsqrt(mean(f32(x) * f32(x), over="D") + 1.0), x.dtype)}


CASES = [
    (kept, {"V": 4, "D": 128, "S": 64}),
    (kept, {"V": 32, "D": 128, "S": 64}),
    (short, {"V": 3, "D": 64}),
    (short, {"V": 40, "D": 32}),
    (short, {"V": 1, "D": 100}),
    (pooled, {"D": 2048, "P": 648, "S": 64}),
    (scaled, {"D": 2048, "P": 648}),
    (scaled, {"D": 256, "P": 4096}),
    (normed, {"D": 2048, "P": 641}),
    (twice, {"D": 1024, "I": 64, "P": 64}),
    (twice, {"D": 2048, "I": 512, "P": 2048}),
    (planes, {"D": 64, "G": 2, "P": 32}),
    (planes, {"D": 512, "G": 4, "P": 256}),
    (over_rows, {"D": 128, "P": 128}),
]


@pytest.mark.parametrize(
    ("made", "sizes"), CASES, ids=lambda x: x.name if hasattr(x, "name") else "-".join(map(str, x.values()))
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_class_of_rows_is_legal_and_adds_up_alike(made, sizes, dtype):
    """A row's bits may not depend on the rows beside it, whatever is declared."""
    binding = example(made, sizes, dtype, {})
    graph = made.trace(binding)
    axis, orders = class_axis(graph), set()
    for least in row_classes(graph):
        schedule = heuristic(graph, tokens_class(graph, {axis: least}) if axis else None)
        assert legal(graph, schedule) is None
        orders.add(order(plan(graph, schedule, contiguous(graph, dict(binding.sizes)))))
    assert len(orders) == 1
