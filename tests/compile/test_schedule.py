"""Schedules: what is legal and why not, heuristics, text form, and plans of split programs."""

import dataclasses
from math import prod

import numpy as np
import programs as good
import pytest
import unseen
from hypothesis import given
from hypothesis import strategies as st

from moekit.backends import triton
from moekit.compile.passes.form import over_operand
from moekit.compile.rules import heuristic, row_classes, spread
from moekit.compile.schedule import (
    Abreast,
    Dependent,
    Launch,
    Loop,
    Pair,
    Parts,
    Prefetch,
    Rounds,
    Schedule,
    Section,
    Split,
    Stage,
    Stages,
    Tile,
    Warps,
    Whole,
    pow2,
)  # fmt: skip
from moekit.compile.schedule.cuts import cut
from moekit.compile.schedule.legal import legal
from moekit.errors import ScheduleError
from moekit.fusions import FUSIONS
from moekit.lang import In, argmax, f32, fusion, iota, mean, sum
from moekit.testing import Call, check, operands, run, variants
from moekit.testing.draw import axes_of
from moekit.testing.probes import PROBES
from moekit.testing.values import shapes_of
from tests.declarations import DECLARATIONS

NORM = good.graph_of(good.norm, {"x": (7, 50), "weight": (50,)})
GEMM = good.graph_of(FUSIONS["gate_gemm"], {"x": (5, 70), "packed": (35, 70)})
WINDOW = good.graph_of(good.window, {"x": (3,), "state": (3, 6)})
DEEP = good.graph_of(FUSIONS["gate_gemm"], {"x": (5, 64), "packed": (35, 64)}, "bfloat16")
TOPK = good.graph_of(FUSIONS["topk_softmax"], {"logits": (5, 60)}, k=10)
BOTH = good.graph_of(good.both_updated, {"a": (3, 20), "b": (3, 20, 40)})
OVER = over_operand(good.graph_of(PROBES["probe_centred"], {"x": (3, 20, 10)}), (("out", "x"),))
GATES = good.graph_of(
    FUSIONS["gate_projections"], {"x": (5, 70), "gate_up": (50, 70), "router": (33, 70), "shared_gate": (1, 70)}, "bfloat16"
)
THEN = "then loop:D.part:1 tile:T:1 tile:P:64"
ABREAST = "activated(tile:T:16 loop:D:16 tile:I:16) logits(tile:T:{} loop:D:16 tile:E:16) share(tile:T:16 loop:D:16 tile:G:16)"
SLOTS = good.graph_of(good.accumulate, {"x": (3, 20), "slots": (3,), "state": (9, 20)})

REFUSED = [
    (NORM, "tile:T:4", "norm: the schedule must say once what is done with axis H; it speaks of T"),
    (NORM, "tile:T:4 whole:H:64 tile:T:2", "must say once what is done with axis T; it speaks of T, H, T"),
    (NORM, "tile:T:4 whole:H:64 tile:Q:1", "names axis Q, which the fusion does not use; it has T, H"),
    (NORM, "tile:T:3 whole:H:64", "axis T cannot be tile in blocks of 3: a block is a power of two"),
    (NORM, "tile:T:0 whole:H:64", "axis T cannot be tile in blocks of 0: a block is a power of two"),
    (NORM, "tile:T:4 whole:H:32", "axis H cannot be whole in blocks of 32: it has 50 elements"),
    (NORM, "whole:T:8 whole:H:64", "axis T cannot be whole in blocks of 8: its size is dynamic"),
    (NORM, "tile:T:4 tile:H:16", "axis H cannot be tile in blocks of 16: it is reduced, scanned or missing from an output"),
    (TOPK, "tile:T:1 loop:E:16 whole:K:16", "axis E cannot be loop in blocks of 16: a scan or top_k runs along it"),
    (WINDOW, "tile:T:1 tile:H:4", "axis H cannot be tile in blocks of 4: a scan or top_k runs along it, an update"),
    (WINDOW, "tile:T:1 loop:H:4", "axis H cannot be loop in blocks of 4: a scan or top_k runs along it, an update"),
    (NORM, "tile:T:4 whole:H:64 warps:3", "3 warps and 2 stages; warps are one of"),
    (NORM, "tile:T:4 whole:H:64 stages:9", "4 warps and 9 stages; warps are one of"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 split:P:2 {THEN}", "axis P cannot be split in 2: only a reduced axis"),
    (GEMM, f"tile:D.part:1 tile:T:16 whole:D:128 tile:P:16 split:D:2 {THEN}", "D cannot be split in 2: a split axis is looped"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 split:D:1 {THEN}", "axis D cannot be split in 1: the parts are 2 to 64"),
    (GEMM, f"tile:D.part:2 tile:T:16 loop:D:16 tile:P:16 split:D:2 {THEN}", "must be tile:D.part:1, not tile:D.part:2"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 split:D:65 {THEN}", "axis D cannot be split in 65: the parts are 2 to 64"),
    (NORM, "tile:T:4 loop:H:16 parts:H:2", "axis H cannot be split in 2: an output runs along it"),
    (GEMM, f"tile:D.part:1 tile:T:16 loop:D:16 tile:P:16 parts:D:2 split:D:2 {THEN}", "only one axis can be split or done in"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 split:D:2", "a launch that is not the last ends with split or stage, the last one"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 {THEN}", "a launch that is not the last ends with split or stage, the last one"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 pair:packed", "no two products with packed can be paired; they have one left"),
    (GATES, "activated(tile:T:16 loop:D:2 tile:I:16) logits(tile:T:16 loop:D:2 tile:E:16) share(tile:T:16 loop:D:2 tile:G:1) "
     "dependent dependent", "dependent and dependent cannot both be said; say one"),
    (DEEP, "tile:T:16 loop:D:16 tile:P:16 prefetch:packed", "packed cannot be prefetched by a launch that begins when the one"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 prefetch:x", "x cannot be prefetched; a weight of static size can, in a product"),
    (GEMM, "tile:T:16 whole:D:128 tile:P:16 prefetch:packed", "packed cannot be prefetched; a weight of static size can"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 stage:x {THEN}", "x cannot be staged; results of products and sums and narrowing"),
    (GATES, "activated(tile:T:16) logits(tile:T:16)", "the launch makes activated, logits, share, the sections"),
    (BOTH, "a(tile:T:1 whole:H:32 whole:P:64) b(tile:T:1 whole:H:32 tile:P:8)", "the section of a reads b, which another"),
    (SLOTS, "tile:T:2 whole:H:32", "an output is put at ids along T, so its block must be 1, not 2"),
    (BOTH, "tile:T:1 loop:H:8 loop:P:8", "b and a are stored in loops that load what the others overwrite; loop over one"),
    (OVER, "tile:T:1 loop:A:4 loop:B:4", "x is overwritten in a loop that reads other elements of it later; loop over one"),
    (GEMM, f"loop:D.part:1 tile:T:16 loop:D:16 tile:P:16 split:D:2 {THEN}", "must be tile:D.part:1, not loop:D.part:1"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 warps:4 warps:8", "warps:4 and warps:8 cannot both be said; say one"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 parts:D:2 parts:D:4", "parts:D:2 and parts:D:4 cannot both be said; say one"),
    (GEMM, f"tile:T:16 loop:D:16 tile:P:16 split:D:2 stage:acc {THEN}", "split:D:2 and stage:acc cannot both be said; say one"),
    (GEMM, "tile:T:16 loop:D:16 tile:P:16 pair:packed pair:packed", "pair:packed and pair:packed cannot both be said; say one"),
    (GATES, f"{ABREAST.format(32)} abreast:T", "sections cannot be abreast along T: they need the same blocks"),
    (GATES, f"{ABREAST.format(16)} abreast:E", "sections cannot be abreast along E: they need the same blocks"),
    (NORM, "tile:T:4096 whole:H:64", "a block of 262144 elements is over the limit of 131072; use smaller blocks or loop"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "text", "why"), REFUSED, ids=[text for _, text, _ in REFUSED])
def test_illegal_schedules_say_why(graph, text, why):
    """One sentence that names the fusion and the axis; a plan raises it."""
    message = legal(graph, Schedule.parse(text))
    assert message is not None
    assert why in message
    assert message.startswith(f"{graph.name}: ")
    assert "\n" not in message
    with pytest.raises(ScheduleError) as error:
        good.planned(graph, text)
    assert str(error.value) == message


@fusion(None, x=In("T H"))
def spread_out(x):
    """A sum that needs the result of another over the same axis."""
    return mean(f32(x) * f32(iota("H") == argmax(x, over="H")), over="H")


def test_split_of_dependent_reductions_is_refused():
    """Two launches carry one round of partial sums."""
    graph = good.graph_of(spread_out, {"x": (3, 50)})
    schedule = Schedule.parse("tile:T:4 loop:H:16 split:H:2 then tile:T:4 loop:H.part:1")
    assert "one of its reductions needs the result of another" in legal(graph, schedule)


@pytest.mark.parametrize("text", ["loop:H:8 whole:P:64", "whole:H:32 loop:P:8", "loop:H:32 whole:P:64", "tile:H:4 whole:P:64"])
def test_two_updated_tensors_that_need_each_other(text):
    """Both are loaded before either is stored, in every schedule but the one that is refused."""
    values = operands(good.both_updated, {"T": 3, "H": 20, "P": 40}, "float32")
    check("interpret", Call(good.both_updated, values, schedule=Schedule.parse(f"tile:T:1 {text}")))


def test_updated_tensors_that_need_each_other_s_sums():
    """What is summed up before the loops that store is in nobody's way."""
    graph = good.graph_of(good.crossed, {"a": (3, 20), "b": (3, 40)})
    assert legal(graph, Schedule.parse("tile:T:1 loop:H:8 loop:P:8")) is None
    values = operands(good.crossed, {"T": 3, "H": 20, "P": 40}, "float32")
    check("interpret", Call(good.crossed, values, schedule=Schedule.parse("tile:T:1 loop:H:8 loop:P:8")))


UNREADABLE = [
    "T",
    "T:grid",
    "T:grid:x",
    "split:D",
    "warps:many",
    "tile:T",
    "tile:T:x",
    "tile:T:4:4",
    "out(warps:4)",
    "out(tile:T:4",
]


@pytest.mark.parametrize("text", [*UNREADABLE, "tile:T:4 out(loop:H:4)", "out)", "out(a(tile:T:4))", "tile"])
def test_unreadable_schedules(text):
    """What cannot be read is shown, with the form that can."""
    with pytest.raises(ScheduleError, match=r"cannot read schedule .*; write DIRECTIVE:AXIS:BLOCK"):
        Schedule.parse(text)


@pytest.mark.parametrize("graph", [NORM, GEMM, TOPK, SLOTS, GATES], ids=lambda g: g.name)
def test_text_and_back(graph):
    """Every schedule reads back as itself."""
    for schedule in [heuristic(graph), *filter(None, variants(graph).values())]:
        assert Schedule.parse(str(schedule)) == schedule


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,5}", fullmatch=True).filter(lambda n: n != "then")
COUNTS = st.integers(0, 2**20)


def _of(*kinds):
    fields = {"int": COUNTS, "str": NAMES}
    return st.one_of([st.builds(k, *(fields[str(f.type)] for f in dataclasses.fields(k))) for k in kinds])


SECTIONS = st.builds(Section, st.lists(NAMES, max_size=3).map(tuple),
                     st.lists(_of(Tile, Whole, Loop, Parts, Rounds, Pair, Prefetch), max_size=4).map(tuple))  # fmt: skip
LAUNCHES = st.builds(Launch, st.lists(SECTIONS, min_size=1, max_size=3).map(tuple),
                     st.lists(_of(Warps, Stages, Dependent, Abreast, Split, Stage), max_size=4).map(tuple))  # fmt: skip


@given(st.builds(Schedule, st.lists(LAUNCHES, min_size=1, max_size=3).map(tuple)))
def test_any_text_and_back(schedule):
    """Legal or not; white space does not matter."""
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(str(schedule).replace(" ", "\n  ")) == schedule


def test_powers_of_two():
    """The smallest that is large enough."""
    assert [pow2(n) for n in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 1024, 2048]


SIZES = [1, 2, 7, 64, 1000, 4096, 16384, 20000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=lambda f: f.name)
def test_heuristic_is_legal_for_every_size(fusion, size):
    """A good schedule without tuning, from one element to the widest row; E and k stay in their limits."""
    sizes = {"T": 3, **dict.fromkeys("HIPDLCJN", size), "E": min(size, 1024), "G": 1, "V": 4, "K": 2, "Dk": 8, "Dv": 8}
    sizes |= {"S": 3, "Q": 2, "R": min(size, 64), "M": 2}
    sizes |= dict.fromkeys(("Lr", "Lc"), min(size, 16)) | dict.fromkeys(("Cq", "Ck", "Cv"), min(size, 200))
    wanted = {a: sizes[a] for a in axes_of(fusion)}
    if fusion.name == "delta_rule_step":
        wanted |= {"Dk": min(size, 256), "Dv": min(size, 256)}
    params = {n: x for n, x in {"k": min(sizes["E"], 32), "experts": sizes["E"]}.items() if n in fusion.params}
    shapes = shapes_of(fusion, wanted, params and fusion.bind_params(params))
    graph = good.graph_of(fusion, shapes, **params)
    assert legal(graph, heuristic(graph)) is None


@pytest.mark.parametrize("fusion", unseen.SIZES, ids=lambda f: f.name)
def test_heuristic_does_not_depend_on_dynamic_sizes(fusion):
    """A row's result may not depend on T, so no schedule may."""
    few, many = unseen.SIZES[fusion], unseen.SIZES[fusion] | dict.fromkeys(fusion.dynamic, 5000)
    first, second = (Call(fusion, operands(fusion, s)).graph for s in (few, many))
    assert first == second
    assert heuristic(first) == heuristic(second)


@pytest.mark.parametrize(
    ("name", "shapes", "classes"),
    [
        ("silu_and_mul", {"gate_up": (4, 2048)}, (0, 1024)),
        ("silu_and_mul", {"gate_up": (4, 120)}, (0, 17477)),
        ("shared_expert_combine", {"hidden": (4, 4096), "shared": (4, 4096), "gate": (4, 1)}, (0, 256)),
        ("shared_expert_combine", {"hidden": (4, 2**21), "shared": (4, 2**21), "gate": (4, 2**21)}, (0, 2)),
        ("add_rms_norm", {"x": (4, 2048), "residual": (4, 2048), "weight": (2048,)}, (0,)),
    ],
)
def test_classes_of_rows(name, shapes, classes):
    """What adds nothing up has larger tiles from 2^20 elements on, what adds up has one schedule (a GEMM apart)."""
    graph = good.graph_of(FUSIONS[name], shapes)
    assert row_classes(graph) == classes
    few, many = heuristic(graph), heuristic(graph, classes[-1])
    for rows in (1, classes[-1] - 1, classes[-1], classes[-1] + 1, 10**6):
        assert heuristic(graph, max(0, rows)) == (many if rows >= classes[-1] else few)
    assert legal(graph, many) is None
    if len(classes) > 1:
        (launch,) = many.launches
        assert (prod(d.block for d in launch.sections[0].axes), launch.warps) == (2048, 8)


@pytest.mark.parametrize(("sizes", "least"), [({"E": 512}, 2048), ({"E": 60}, 2048)])
def test_launches_of_many_programs_of_one_warp_are_not_dependent(sizes, least):
    """Their kernels are those of fewer rows; those of several warps are dependent whatever their number."""
    graph = good.graph_of(FUSIONS["topk_softmax"], {"logits": (4, sizes["E"])}, k=10)
    assert row_classes(graph) == (0, least)
    (few,), (many,) = heuristic(graph, least - 1).launches, heuristic(graph, least).launches
    assert (few.warps, few.dependent, many.dependent) == (1, True, False)
    assert many == few.without(Dependent)
    assert all(launch.dependent for rows in (1, 10**6) for launch in heuristic(NORM, rows).launches)


def test_narrow_rows_are_many_programs_before_they_are_many_elements():
    """A class for each: 8 rows of 3 a program, then blocks of 2048."""
    graph = good.graph_of(FUSIONS["silu_and_mul"], {"gate_up": (4, 6)})
    classes = row_classes(graph)
    assert classes == (0, 8 * 2047 + 1, -(-(2**20) // 3))
    assert [heuristic(graph, n).launches[0].dependent for n in classes] == [True, False, True]


@pytest.mark.parametrize("fusion", [FUSIONS["silu_and_mul"], FUSIONS["shared_expert_combine"]], ids=lambda f: f.name)
def test_rows_have_the_same_bits_in_both_classes(fusion):
    """Larger tiles change no row: masks and all, at sizes that no block divides."""
    call = Call(fusion, operands(fusion, {"T": 37, "I": 60, "H": 60}, "bfloat16"))
    few, many = (Call(fusion, call.operands, schedule=heuristic(call.graph, rows)) for rows in (None, 17477))
    assert few.schedule != many.schedule
    for name, out in run("interpret", few).outputs.items():
        np.testing.assert_array_equal(out, run("interpret", many).outputs[name])


def test_split_plan_has_two_launches_and_scratch_between():
    """Partial sums have a dimension for the parts; the second launch adds them in one fixed order."""
    plan = good.planned(GEMM, spread(GEMM, "tile:T:16 loop:D:16 tile:P:16 split:D:3"))
    first, second = plan.programs
    (scratch,) = plan.scratch
    assert (scratch.axes, scratch.sizes) == (("D.part", "T", "P"), (3, None, 35))
    assert scratch.shape({"T": 7}) == (3, 7, 35)
    assert [p.name for p in first.params if p.role == "Out"] == [scratch.name]
    assert [p.name for p in second.params if p.role == "In"] == [scratch.name]
    assert (second.axis("D.part").mode, second.axis("D.part").block) == ("loop", 1)
    assert first.axis("D").parts == 3
    assert str(plan).count("program ") == 2


@fusion(lambda x, w, v: {"out": (x.astype(np.float64) @ w.T @ v.T).sum(-1)}, x=In("T D"), w=In("H D"), v=In("P H"))
def chain(x, w, v):
    """Two products in a row, and their sum."""
    return sum(sum(sum(f32(x) * f32(w), over="D") * f32(v), over="H"), over="P")


def _summed(x, partial_0):
    return {"out": np.sum(x, axis=1, dtype=np.float64)[:, None] * partial_0}


@fusion(_summed, x=In("T D"), partial_0=In("T H"))
def named_like_scratch(x, partial_0):
    """An operand called what scratch is called."""
    return sum(f32(x), over="D") * f32(partial_0)


SUMMED = "tile:T:2 tile:D.part:1 loop:D:8 tile:H:8 split:D:2 then loop:D.part:1 tile:T:2 loop:H:8 tile:P:4"
CUT_TWICE = [
    (chain, f"{SUMMED} tile:H.part:1 split:H:3 then loop:H.part:1 tile:T:1 loop:P:4"),
    (chain, "tile:T:2 loop:D:8 tile:H:8 stage:sum_d then tile:T:2 loop:H:8 tile:P:4 stage:sum_h then tile:T:2 loop:P:8"),
    (named_like_scratch, "tile:T:1 tile:D.part:1 loop:D:8 split:D:2 then loop:D.part:1 tile:T:1 tile:H:8"),
]


@pytest.mark.parametrize(("cut_up", "text"), CUT_TWICE, ids=[f"{f.name}-{text.count('then')}" for f, text in CUT_TWICE])
def test_no_scratch_or_kernel_takes_the_name_of_another(cut_up, text):
    """Whatever an earlier cut, or the declaration, calls its tensors."""
    call = Call(cut_up, operands(cut_up, {"T": 3, "D": 40, "H": 24, "P": 20}, "float32"), schedule=Schedule.parse(text))
    check("interpret", call)
    plan = good.planned(call.graph, text)
    assert len({p.name for p in plan.programs}) == len(plan.programs)
    assert len({s.name for s in plan.scratch} | set(call.graph.tensors)) == len(plan.scratch) + len(call.graph.tensors)


@fusion(lambda x, w: {"out": x.astype(np.float64) * w.astype(np.float64).sum()}, x=In("T H"), w=In("D"))
def by_a_sum(x, w):
    """Rows by the sum of a weight."""
    total = sum(f32(w), over="D")
    return f32(x) * total


def test_a_single_number_can_be_staged():
    """Scratch without a dimension, in all that takes it."""
    schedule = Schedule.parse("whole:D:64 warps:1 stage:total then tile:T:1 whole:H:16 warps:1")
    call = Call(by_a_sum, operands(by_a_sum, {"T": 3, "D": 40, "H": 10}, "float32"), schedule=schedule)
    check("interpret", call)
    assert all("total_ptr" in triton.emit(p) for p in good.planned(call.graph, schedule).programs)


def test_split_of_an_update_reads_the_old_value_once():
    """An InOut tensor is read and written in the second launch only."""
    graph = good.graph_of(FUSIONS["delta_rule_step"], _delta_shapes(), "float32")
    split = variants(graph).get("split")
    assert split is None or all(p.role != "InOut" for p in good.planned(graph, split).programs[0].params)


def _delta_shapes() -> dict[str, tuple]:
    heads = {"q": (3, 2, 8), "k": (3, 2, 8), "v": (3, 4, 9), "a": (3, 4), "b": (3, 4)}
    return heads | {"A_log": (4,), "dt_bias": (4,), "state": (3, 4, 8, 9)}


def test_a_directive_takes_the_place_of_its_like():
    """An axis is held in one way, a launch has one number of warps; other directives are added."""
    (launch,) = Schedule.parse("tile:T:4 whole:H:64 warps:4").launches
    (section,) = launch.sections
    assert str(section.but(Loop("H", 16), Tile("T", 8))) == "tile:T:8 loop:H:16"
    assert str(launch.but(Warps(8), Stages(3))) == "tile:T:4 whole:H:64 warps:8 stages:3"
    assert str(section.but(Pair("w")).without(Whole)) == "tile:T:4 pair:w"


def test_several_splits_are_refused():
    """A launch has one."""
    graph = Call(unseen.double_softmax, operands(unseen.double_softmax, unseen.SIZES[unseen.double_softmax])).graph
    with pytest.raises(ScheduleError):
        good.planned(graph, "tile:T:1 loop:A:2 loop:B:2 split:A:2 split:B:2")


def test_one_wish_for_all_sections():
    """A section takes what it can of it; the rest, and a second launch, are the rules'."""
    (launch,) = spread(GATES, "tile:T:64 loop:D:16 tile:I:16 tile:G:4 warps:8").launches
    activated, logits, share = launch.sections
    assert [(s.block("T"), s.block("D")) for s in (activated, logits, share)] == [(64, 16)] * 3
    assert (activated.block("I"), share.block("G"), launch.warps) == (16, 4, 8)
    first, second = spread(GATES, "loop:D:16 split:D:3").launches
    assert [s.block("D") for s in first.sections] == [16] * 4
    assert second == heuristic(cut(GATES, Split("D", 3))[1]).launches[0]


@pytest.mark.parametrize("width", [256, 1024, 2048])
def test_sums_beside_products_have_the_same_warps_whatever_the_rows(width):
    """How lanes add up a row depends on the warps of its launch, and a GEMM's differ by the class of rows."""
    shapes = {"x": (3, width), "residual": (3, width), "weight": (width,), "gate_up": (64, width), "router": (64, width)}
    graph = good.graph_of(DECLARATIONS["gate_block"], shapes | {"shared_gate": (1, width)}, "bfloat16")
    warps = {tuple(p.warps for p in good.planned(graph, heuristic(graph, rows)).programs) for rows in row_classes(graph)}
    assert len(warps) == 1


def test_blocks_of_parts_fill_more_than_half_of_an_sm():
    """So that no two of one launch's programs come to share an SM; and all of them fit, whatever else a program loads."""
    for columns in (300, 648, 1544, 4096, 20000):
        graph = good.graph_of(FUSIONS["gate_gemm"], {"x": (3, 2048), "packed": (columns, 2048)}, "bfloat16")
        for rows in row_classes(graph):
            launch = heuristic(graph, rows).launches[0]
            (section,) = launch.sections
            if launch.cut or section.parts:
                block = (section.block("T") + section.block("P")) * section.block("D") * 2
                held = block * (launch.stages - (section.block("T") < 64))
                assert 227 * 2**9 < held <= 227 * 2**10 or launch.stages == 8, (columns, rows, str(launch))
