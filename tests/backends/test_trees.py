"""How Triton shares a row out that is summed up: alike in every kernel that may serve the row."""

import re

import pytest

from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.rules.alike import alike
from moekit.compile.rules.order import order
from moekit.compile.schedule import Schedule
from moekit.compile.tile.layouts import contiguous
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example

pytest.importorskip("triton")
from .sm_90 import compiled

LAYOUT = re.compile(r"(#blocked\d*) = #ttg.blocked<\{(.*?)\}>")
SUM = re.compile(r'"tt\.reduce"\(%\w+\) <\{axis = (\d+).*?\}> \(\{.*?arith\.addf.*?\}\) : \(tensor<(\w+), (#\w+)>\)', re.S)
SHARES = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")

ROWS = [
    ("gated_rms_norm", {"V": 4, "D": 128}),
    ("gated_rms_norm", {"V": 32, "D": 128}),
    ("gated_rms_norm", {"V": 5, "D": 96}),
    ("gated_rms_norm", {"V": 3, "D": 64}),
    ("add_rms_norm", {"H": 40}),
    ("add_rms_norm", {"H": 2048}),
]


def _graph(name: str, sizes: dict, dtype: str):
    binding = example(FUSIONS[name], sizes, dtype, {})
    return FUSIONS[name].trace(binding), dict(binding.sizes)


def _shares(program) -> list[tuple]:
    """Of each sum over an axis: elements together, lanes and warps along it."""
    text = compiled(program).asm["ttgir"]
    layouts = {name: {k: [*map(int, re.findall(r"\d+", v))] for k, v in re.findall(r"(\w+) = \[(.*?)\]", said)}
               for name, said in LAYOUT.findall(text)}  # fmt: skip
    return [tuple(layouts[layout][k][int(axis)] for k in SHARES) for axis, _, layout in SUM.findall(text)]


def _plan(graph, sizes: dict, schedule: Schedule, kind: str):
    layouts = {
        n: t.Strided(tuple(kind if k == "aligned" else k for k in x.strides)) for n, x in contiguous(graph, sizes).items()
    }
    return plan(graph, schedule, layouts)


@pytest.mark.parametrize("kind", ["aligned", "any"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "sizes"), ROWS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))
def test_a_row_is_shared_out_alike_whatever_the_number_of_rows(name, sizes, dtype, kind):
    """In the order that the compiler reads off its program, for all of the heuristic's schedules."""
    graph, every = _graph(name, sizes, dtype)
    plans = [_plan(graph, every, heuristic(graph, least or None), kind) for least in row_classes(graph)]
    found = [_shares(program) for planned in plans for program in planned.programs]
    assert found[0]
    assert all(shares == found[0] for shares in found)
    for planned, (shared, *_) in zip(plans, found, strict=True):
        (said,) = order(planned.programs)
        assert shared in said[-1], said


def test_rows_across_memory_are_not_shared_out_alike():
    """Where the heads lie side by side, larger programs leave a row other lanes: there the number of rows chooses nothing."""
    graph, sizes = _graph("gated_rms_norm", {"V": 32, "D": 128}, "bfloat16")
    schedules = [heuristic(graph, least or None) for least in row_classes(graph)]
    for rows, same in (
        (("aligned", "aligned", "unit"), True),
        (("any", "any", "unit"), True),
        (("aligned", "unit", "any"), False),
    ):
        layouts = contiguous(graph, sizes) | {"x": t.Strided(rows)}
        shares = [_shares(plan(graph, s, layouts).programs[0]) for s in schedules]
        assert (shares[0] == shares[1]) is same
        assert alike(graph, layouts) is same


@pytest.mark.parametrize(("name", "sizes"), [("silu_and_mul", {"I": 8}), ("gate_gemm", {"D": 32, "P": 24})])
def test_what_sums_no_row_may_lie_anyhow(name, sizes):
    """Nothing is added up, or on the matrix unit."""
    graph, sizes = _graph(name, sizes, "bfloat16")
    first = next(iter(graph.tensors))
    assert alike(graph, contiguous(graph, sizes) | {first: t.Strided(("unit", "any"))})


def test_rows_of_a_view_lie_along_its_base():
    """In JAX: the innermost axis of the base, one element after the other."""
    graph, sizes = _graph("gated_rms_norm", {"V": 4, "D": 16}, "bfloat16")
    others = {n: x for n, x in contiguous(graph, sizes).items() if n != "x"}
    for axes, steps, same in (((0, 1, 2), (1, 2, 1), True), ((0, 1, 2), (1, 1, 2), False), ((0, 2, 1), (1, 1, 1), False)):
        assert alike(graph, others | {"x": t.Viewed("x", (9, 32, 32), axes, (0, 0, 0), steps)}) is same


def test_what_is_shared_out_otherwise_has_another_order():
    """Two warps for four rows give a row that cannot be loaded in one go other lanes than four warps for eight do."""
    graph, sizes = _graph("gated_rms_norm", {"V": 4, "D": 128}, "bfloat16")
    few, many = (Schedule.parse(f"tile:T:{t} tile:V:4 whole:D:128 warps:{w} stages:1") for t, w in ((1, 2), (2, 4)))
    shares = {k: [_shares(_plan(graph, sizes, s, k).programs[0]) for s in (few, many)] for k in ("aligned", "any")}
    assert shares["aligned"][0] == shares["aligned"][1]
    assert shares["any"][0] != shares["any"][1]
    assert order(_plan(graph, sizes, few, "aligned").programs) != order(_plan(graph, sizes, many, "aligned").programs)
