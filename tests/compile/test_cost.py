"""The cost of schedules, what is refused for it, and values that one launch stages for the next."""

from dataclasses import replace

import numpy as np
import programs as good
import pytest

from moekit.compile.rules import heuristic, row_classes
from moekit.compile.schedule import Schedule, Stage
from moekit.compile.schedule.cost import cost, runaway
from moekit.compile.schedule.cuts import cut, stageable
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import MEASURED
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, contract, f32, fusion, gather, halves, iota, silu, sum, where
from moekit.lang.arguments import example
from moekit.testing import Call, check, operands, run
from tests.sizes import sizes_of


def _layer(x, gate_up, down, ids, weights):
    """Both halves of the routed experts by their own references."""
    activated = FUSIONS["expert_gate_up"].reference(x, gate_up, ids)["activated"]
    return FUSIONS["expert_down"].reference(activated.astype(x.dtype), down, ids, weights)


@fusion(_layer, x=In("T D"), gate_up=In("E 2*I D"), down=In("E I H"), ids=In("T K", dtype="int32"), weights=In("T K"))
def expert_layer(x, gate_up, down, ids, weights):
    """The routed experts in one declaration."""
    gate, up = (contract(x, gather(part, ids, over="E"), over="D") for part in halves(gate_up, "I"))
    hidden = cast(silu(gate) * up, x.dtype)
    each = cast(contract(hidden, gather(down, ids, over="E"), over="I"), x.dtype)
    return {"out": cast(sum(f32(each) * f32(weights), over="K"), x.dtype)}


FULL = {"D": 2048, "I": 512, "H": 2048, "E": 512, "K": 10}
SMALL = {"T": 3, "D": 96, "I": 40, "H": 70, "E": 5, "K": 4}
ONE = "tile:T:1 loop:K:1 whole:D:2048 loop:I:16 tile:H:64 warps:4 stages:1"


def layer(sizes=FULL, dtype="bfloat16"):
    """The graph of the layer."""
    shapes = {n: tuple(d.size({"T": 3, **sizes}) for d in s.dims) for n, s in expert_layer.tensors.items()}
    return good.graph_of(expert_layer, shapes, dtype)


def test_products_made_anew_for_every_column_are_refused():
    """One launch would make gate and up for each of 32 blocks of columns."""
    why = legal(layer(), Schedule.parse(ONE))
    assert why is not None
    assert why.startswith("expert_layer: ")
    assert "would be made 32 times over, anew for every block of H; stage it, or what is made of it" in why


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_rules_stage_an_expert_layer(dtype):
    """Nothing is made twice; what is staged is what the declaration rounds, or a product; one schedule for all rows."""
    graph = layer(dtype=dtype)
    schedule = heuristic(graph)
    assert legal(graph, schedule) is None
    staged = [launch.cut.value for launch in schedule.launches if isinstance(launch.cut, Stage)]
    assert staged
    assert dtype == "float32" or staged == ["hidden"]
    assert [one.again for one in cost(graph, schedule, {"T": 16})] == pytest.approx([1.0] * len(schedule.launches))
    assert row_classes(graph) == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["interpret", "pallas"])
def test_a_staged_layer_is_right(implementation, dtype):
    """As its reference has it; an id of no expert among them."""
    values = operands(expert_layer, SMALL, dtype, "normal", 1)
    values["ids"] = np.where(np.arange(12).reshape(3, 4) == 5, 77, np.arange(12).reshape(3, 4) % 5).astype(np.int32)
    call = Call(expert_layer, values)
    check(implementation, replace(call, schedule=_staged(call.graph)))


def _staged(graph) -> Schedule:
    value = next(v for v in ("hidden", *stageable(graph)) if v in stageable(graph))
    first, rest, _ = cut(graph, Stage(value))
    (launch,), after = heuristic(first).launches, heuristic(rest).launches
    return Schedule((launch.but(Stage(value)), *after))


def test_staging_changes_no_bit():
    """What is staged is rounded where it stands; sums are taken as before."""
    call = Call(expert_layer, operands(expert_layer, SMALL, "bfloat16", "normal", 2))
    (launch,) = Schedule.parse("tile:T:1 loop:K:1 whole:D:128 whole:I:64 tile:H:32 warps:4 stages:1").launches
    first = Schedule.parse("tile:T:1 tile:K:1 whole:D:128 whole:I:64 warps:4 stages:1").launches[0].but(Stage("hidden"))
    rest = replace(launch, sections=(replace(launch.sections[0], directives=tuple(
        d for d in launch.sections[0].directives if getattr(d, "axis", "") != "D"
    )),))  # fmt: skip
    both = Schedule((launch,)), Schedule((first, rest))
    outs = [run("interpret", replace(call, schedule=s)).outputs["out"] for s in both]
    np.testing.assert_array_equal(*outs)


def test_what_may_be_staged():
    """Products, sums and narrowing casts; not what a sum could take up as one rounding."""
    graph = layer()
    found = stageable(graph)
    assert {"gate", "up", "hidden", "each"} & set(found) >= {"hidden", "each"}
    for node in found.values():
        n = graph.nodes[node]
        assert n.op in ("contract", "reduce") or (n.op, n.dtype) == ("cast", "bfloat16")
    products = {i for i in graph.live() if graph.nodes[i].op == "mul"}
    assert products.isdisjoint(found.values())
    schedule = Schedule.parse(f"{ONE} stage:ids then tile:T:1")
    assert "cannot be staged; results of products and sums and narrowing casts can" in (legal(graph, schedule) or "")


@fusion(x=In("T D"), y=In("T D"), w=In("P D"), v=In("P"))
def nameless(x, y, w, v):
    """Values without names, and a parameter that is called as one of them could be."""
    sum_d = f32(y)
    wide = contract(f32(x), f32(w), over="D") * f32(v)
    return cast(sum(wide * sum(sum_d, over="D") * sum(f32(x) * f32(x), over="D"), over="P"), x.dtype)


@fusion(x=In("T D"), y=In("T D"), w=In("P D"), v=In("P"))
def nameless_later(x, y, w, v):
    """The same with something else before it."""
    sum_d = f32(y)
    wide = contract(f32(x), where(iota("D") < 3, f32(w), 0.0), over="D") * f32(v)
    return cast(sum(wide * sum(sum_d, over="D") * sum(f32(x) * f32(x), over="D"), over="P"), x.dtype)


@pytest.mark.parametrize("declared", [nameless, nameless_later])
def test_what_is_staged_is_called_by_what_it_is(declared):
    """Whatever else there is, so that kernels keep their names; and a launch later, too."""
    graph = good.graph_of(declared, {"x": (3, 40), "y": (3, 40), "w": (20, 40), "v": (20,)}, "bfloat16")
    assert [*stageable(graph)] == ["product_d", "sum_d_2", "sum_d_3", "sum_p"]
    first, rest, (scratch,) = cut(graph, Stage("product_d"))
    assert (first.name, scratch.name) == (f"{declared.name}_staged_product_d", "staged_product_d")
    assert [*stageable(rest)] == ["sum_d_2", "sum_d_3", "sum_p"]


def test_small_work_may_be_done_again():
    """A launch more would cost more."""
    assert runaway(layer(SMALL), Schedule.parse(ONE.replace("2048", "128")).launches[0]) is None


def test_figures_of_a_cost():
    """By hand: a product of 16 rows with a weight in 4 parts."""
    graph = good.graph_of(FUSIONS["gate_gemm"], {"x": (3, 2048), "packed": (640, 2048)}, "bfloat16")
    schedule = Schedule.parse(
        "tile:D.part:1 tile:T:16 loop:D:256 tile:P:32 warps:4 stages:3 split:D:4 then loop:D.part:1 tile:T:1 tile:P:128 warps:1"
    )
    first, second = cost(graph, schedule, {"T": 16})
    assert (first.programs, second.programs) == (4 * 20, 16 * 5)
    weight, rows, sums = 640 * 2048 * 2, 16 * 2048 * 2, 4 * 16 * 640 * 4
    assert first.moved == weight + rows + sums
    assert first.asked == weight + 20 * rows + sums
    assert (first.products, first.again) == (16 * 640 * 2048, 1.0)
    assert first.shared == 3 * (16 + 32) * 256 * 2
    assert second.moved == second.asked == sums + 16 * 640 * 2


@pytest.mark.parametrize("name", FUSIONS)
def test_rules_leave_what_is_loaded_room_in_shared_memory(name):
    """At the sizes of small layers, too, where one block is a whole contraction: turns under way fit in an SM."""
    small = {"D": 72, "P": 88, "I": 24, "E": 40, "H": 88, "V": 3, "K": 3, "Dk": 8, "Dv": 40, "G": 8, "Q": 24, "L": 300,
             "C": 88, "S": 3, "R": 8, "N": 8, "J": 72, "M": 2, "Cq": 5, "Ck": 5, "Cv": 5, "Lr": 5, "Lc": 5}  # fmt: skip
    params = {"topk_softmax": {"k": 4}, "gate_topk": {"k": 4}, "scaled_gate_topk": {"k": 4}, "moe_align": {"experts": 6}}
    for dtype in ("bfloat16", "float32"):
        made = example(FUSIONS[name], sizes_of(FUSIONS[name], small), dtype, params.get(name, {}))
        graph = FUSIONS[name].trace(made)
        sizes = {a: 37 for a, n in graph.axes.items() if n is None}
        assert all(c.shared <= MEASURED.shared_memory for c in cost(graph, heuristic(graph), sizes))
