"""The heuristic's schedules for all numbers of rows, of declarations that are nobody's fusion: legal, and of one order."""

import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.rules.order import order
from moekit.compile.schedule.facts import gemms
from moekit.compile.schedule.legal import legal
from moekit.compile.tile.layouts import contiguous
from moekit.fusions.scaled import STORED
from moekit.lang import In, InOut, cast, contract, exp, f32, fusion, halves, mean, put, rsqrt, silu, sum
from moekit.lang.arguments import example
from moekit.testing.probes import PROBES


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


@fusion(None, x=In("T D"), w=In("P D"))
def product_and_norm(x, w):
    """A product, and the norm of its left operand's rows."""
    y = f32(x)
    return {"out": cast(contract(x, w, over="D"), x.dtype), "nx": cast(y * rsqrt(mean(y * y, over="D") + 1.0), x.dtype)}


@fusion(None, x=In("T D"), w=In("P D"))
def product_and_squares(x, w):
    """A product, and the sums of squares of its left operand's rows."""
    return {"out": cast(contract(x, w, over="D"), x.dtype), "n": sum(f32(x) * f32(x), over="D")}


@fusion(None, x=In("T D"), w=In("P D"), y=In("T R"))
def product_and_sum(x, w, y):
    """A product, and sums that have nothing to do with it."""
    return {"a": cast(contract(x, w, over="D"), x.dtype), "s": sum(f32(y), over="R")}


@fusion(None, x=In("T D"), w=In("P D"), v=In("Q D"))
def product_and_count(x, w, v):
    """A product, and how many columns of another are positive, for which a program must see them all."""
    return {"out": cast(contract(x, w, over="D"), x.dtype), "n": sum(contract(x, v, over="D") > 0.0, over="Q")}


@fusion(None, x=In("T D"), w=In("P D"), z=In("T P D"), v=In("Q"))
def product_and_rows(x, w, z, v):
    """A product, and sums over the same axis that are apart from it only until the axis is split."""
    return {"out": cast(contract(x, w, over="D"), x.dtype), "s": cast(sum(f32(z), over="D") * f32(v), x.dtype)}


@fusion(None, x=In("T D"), w=In("P D"), v=In("Q D"), u=In("T P"))
def scaled_beside(x, w, v, u):
    """A product, and another with an element of its own for each of the first's columns."""
    return {"a": cast(contract(x, w, over="D"), x.dtype), "b": cast(contract(x, v, over="D") * f32(u), x.dtype)}


@fusion(None, x=In("T D"), w=In("A D"), v=In("B D"))
def crossing(x, w, v):
    """Two products of the same rows, each column of one with each of the other."""
    return {"out": cast(contract(x, w, over="D") * contract(x, v, over="D"), x.dtype)}


@fusion(None, x=In("T D"), w=In("A D"), v=In("B D"))
def chained(x, w, v):
    """A product of rows with one of weights."""
    return {"out": cast(contract(x, w, over="D") * contract(w, v, over="D"), x.dtype)}


@fusion(None, x=In("T A B"), w=In("B S"))
def by_rows(x, w):
    """Elements, scaled by the sums of a weight's short rows."""
    return {"out": f32(x) * sum(f32(w), over="S")}


@fusion(None, x=In("T V D"), w=In("D"))
def by_one(x, w):
    """Sums of short rows, scaled by that of a weight."""
    return {"out": sum(f32(x), over="D") * sum(f32(w), over="D")}


@fusion(None, x=In("T A"), w=In("B"))
def spread(x, w):
    """Sums of what is made of rows and a weight, and was not loaded so."""
    return {"out": sum(exp(f32(x) * f32(w)), over="B")}


@fusion(None, x=In("T D"), v=In("Q D"), w=In("P D", dtype=STORED))
def stored_last(x, v, w):
    """A product of a weight as it is, and one of a weight that is converted."""
    return {"b": cast(contract(x, v, over="D"), x.dtype), "a": cast(contract(x, w, over="D"), x.dtype)}


def contracted(made) -> list[str]:
    """The axes of static size that a declaration's products run along."""
    graph = made.trace(example(made, {}, {}, {}))
    along = dict.fromkeys(g.k for g in gemms(graph).values())
    return [a for a in along if graph.axes[a] is not None]


CASES = [
    (kept, {"V": 4, "D": 128, "S": 64}),
    (kept, {"V": 32, "D": 128, "S": 64}),
    (short, {"V": 3, "D": 64}),
    (short, {"V": 40, "D": 32}),
    (short, {"V": 1, "D": 100}),
    (by_rows, {"A": 2, "B": 16, "S": 16}),
    (by_rows, {"A": 8, "B": 64, "S": 32}),
    (by_one, {"V": 4, "D": 128}),
    (by_one, {"V": 32, "D": 128}),
    (spread, {"A": 16, "B": 16}),
    (spread, {"A": 512, "B": 32}),
    (pooled, {"D": 2048, "P": 648, "S": 64}),
    (scaled, {"D": 2048, "P": 648}),
    (scaled, {"D": 256, "P": 4096}),
    (normed, {"D": 2048, "P": 641}),
    (twice, {"D": 1024, "I": 64, "P": 64}),
    (twice, {"D": 2048, "I": 512, "P": 2048}),
    (planes, {"D": 64, "G": 2, "P": 32}),
    (planes, {"D": 512, "G": 4, "P": 256}),
    (over_rows, {"D": 128, "P": 128}),
    (product_and_norm, {"D": 1536, "P": 24}),
    (product_and_norm, {"D": 4096, "P": 7}),
    (product_and_squares, {"D": 2048, "P": 32}),
    (product_and_squares, {"D": 2048, "P": 648}),
    (product_and_sum, {"D": 2048, "P": 648, "R": 64}),
    (product_and_sum, {"D": 65, "P": 24, "R": 3072}),
    (product_and_count, {"D": 2048, "P": 64, "Q": 32}),
    (product_and_rows, {"D": 2048, "P": 32, "Q": 16}),
    (scaled_beside, {"D": 64, "P": 64, "Q": 64}),
    (scaled_beside, {"D": 2048, "P": 64, "Q": 64}),
    (crossing, {"D": 64, "A": 64, "B": 32}),
    (crossing, {"D": 2048, "A": 64, "B": 32}),
    (chained, {"D": 64, "A": 64, "B": 32}),
    (chained, {"D": 2048, "A": 64, "B": 32}),
    (PROBES["probe_braided"], {"I": 64, "D": 2048}),
    *((made, {axis: 2048}) for made in PROBES.values() for axis in contracted(made)),
]


@pytest.mark.parametrize("sizes", [{"D": 2048, "P": 648}, {"D": 64, "P": 40}, {"D": 512, "P": 4096}])
def test_products_of_converted_operands_add_up_alike_wherever_they_stand(sizes):
    """In larger blocks the matrix unit takes converted operands in another order, whichever product is declared first."""
    binding = example(stored_last, sizes | {"Q": 512}, {"x": "bfloat16", "v": "bfloat16", "w": "float8_e4m3fn"}, {})
    graph = stored_last.trace(binding)
    layouts = contiguous(graph, dict(binding.sizes))
    assert len({order(plan(graph, heuristic(graph, n), layouts).programs) for n in row_classes(graph)}) == 1


@pytest.mark.parametrize(
    ("made", "sizes"), CASES, ids=lambda x: x.name if hasattr(x, "name") else "-".join(map(str, x.values()))
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_class_of_rows_is_legal_and_adds_up_alike(made, sizes, dtype):
    """A row's bits may not depend on the rows beside it, whatever is declared."""
    binding = example(made, sizes, dtype, {})
    graph = made.trace(binding)
    orders = set()
    for least in row_classes(graph):
        schedule = heuristic(graph, least)
        assert legal(graph, schedule) is None
        orders.add(order(plan(graph, schedule, contiguous(graph, dict(binding.sizes))).programs))
    assert len(orders) == 1
