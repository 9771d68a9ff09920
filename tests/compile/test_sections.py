"""Sections: outputs over different axes in one launch, and reductions done in parts."""

from dataclasses import replace

import numpy as np
import pytest

from moekit import lang as ml
from moekit.backends import triton
from moekit.compile import tile
from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, spread
from moekit.compile.rules.gemm import deeper
from moekit.compile.rules.sections import sections
from moekit.compile.schedule import Loop, Parts, Schedule, Section, Tile
from moekit.compile.tile import interpret
from moekit.compile.tile.verify import verify
from moekit.errors import VerifyError
from moekit.fusions import FUSIONS
from moekit.lang import In, fusion
from moekit.lang.arguments import example
from moekit.testing import Call, operands
from moekit.testing.suite import check
from tests.declarations import DECLARATIONS

SIZES = {"T": 19, "D": 70, "I": 9, "E": 21, "G": 1, "H": 40}
FIRST = "tile:T:16 loop:D:16 tile:E:16 tile:G:1 tile:I:16"


def call(name: str, schedule: str | None = None) -> Call:
    fusion = DECLARATIONS[name]
    axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
    params = {"k": 3} if "k" in fusion.params else {}
    made = Call(fusion, operands(fusion, {a: SIZES[a] for a in axes}), params)
    return replace(made, schedule=spread(made.graph, schedule)) if schedule else made


def planned(made: Call):
    return plan(made.graph, made.schedule, {n: tile.Strided(("any",) * len(x.dims)) for n, x in made.graph.tensors.items()})


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("gate_projections", [{"activated"}, {"logits"}, {"share"}]),
        ("add_rms_norm", [{"out", "residual"}]),
        ("topk_softmax", [{"weights", "ids"}]),
        ("delta_rule_step", [{"out", "state"}]),
    ],
)
def test_outputs_that_can_share_programs_do(name, groups):
    """Outputs over different axes are apart; those of one norm, one routing or one state are not."""
    sizes = {"T": 3, "H": 40, "E": 21, "V": 4, "K": 2, "Dk": 8, "Dv": 8, "D": 70, "I": 9, "G": 1}
    fusion = FUSIONS[name]
    axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
    made = Call(fusion, operands(fusion, {a: sizes[a] for a in axes}), {"k": 3} if "k" in fusion.params else {})
    assert [{w.tensor for w in g.writes} for g in sections(made.graph)] == groups


def test_few_columns_beside_others_take_twice_the_depth():
    """If an SM has room for it; a program that does not do all parts stays as it is."""
    binding = example(FUSIONS["gate_projections"], {"D": 2048, "I": 512, "E": 512, "G": 1}, "bfloat16", {})
    graph = FUSIONS["gate_projections"].trace(binding)
    (launch,) = heuristic(graph, 4096).launches
    assert [s.block("D") for s in launch.sections] == [64, 64, 128]
    share = sections(graph)[-1]
    few = Section(("share",), (Tile("T", 64), Loop("D", 64), Tile("G", 16), Parts("D", 4)))
    assert [deeper(share, few, stages).block("D") for stages in (2, 12)] == [128, 64]
    assert deeper(share, few.without(Parts), 2) == few.without(Parts)


@pytest.mark.parametrize("depths", [(64, 64, 128), (128, 64, 32)], ids=str)
def test_every_section_does_what_it_is_asked(depths):
    """Each has tiles of its own, and nothing repairs them."""
    made = call("gate_projections", f"{FIRST} warps:4 stages:2")
    (launch,) = made.schedule.launches
    own = tuple(s.but(Loop("D", depth)) for s, depth in zip(launch.sections, depths, strict=True))
    made = replace(made, schedule=Schedule((replace(launch, sections=own),)))
    (kernel,) = planned(made).programs
    assert tuple(p.axis("D").block for p in kernel.sections) == depths
    check("interpret", made)


def test_products_share_no_programs_unless_something_is_done_with_both():
    """Gate and up are multiplied: in one launch one section makes both; where only products are written, one each."""
    whole = planned(call("gate_projections", f"{FIRST} warps:4 stages:2")).programs[0]
    first, second = planned(call("gate_projections", f"{FIRST} split:D:2 warps:4 stages:2")).programs
    assert [len(k.sections) for k in (whole, first, second)] == [3, 4, 3]
    assert [sum(isinstance(op, tile.Dot) for op in _every(s.body)) for s in first.sections] == [1, 1, 1, 0]  # one row is a sum
    assert [sum(isinstance(op, tile.Dot) for op in _every(s.body)) for s in whole.sections] == [2, 1, 0]


def _every(ops):
    for op in ops:
        yield op
        yield from _every(op.body) if isinstance(op, tile.Loop) else ()


def test_what_is_overwritten_is_read_by_its_own_section_alone():
    """The gate block updates the residual in place: in one launch all of it is one section, in two it is not."""
    graph = call("gate_block").graph
    assert len(sections(graph)) == 1
    first, second = planned(call("gate_block")).programs
    assert (len(first.sections), len(second.sections)) == (5, 4)
    assert all(p.role == "In" for p in first.params if p.name == "residual")
    assert [s.name for s in second.sections if any(p.name == "residual" for p in s.params)] == ["gate_block_combine_hidden"]


def test_sections_that_meet_in_memory_are_refused():
    """One section may not read what another of the same launch writes."""
    _, second = planned(call("gate_block")).programs
    hidden, other = second.sections[0], second.sections[1]
    hidden, other = (hidden, other) if any(p.name == "hidden" for p in hidden.params) else (other, hidden)
    written = next(p for p in hidden.params if p.name == "hidden")
    broken = replace(other, params=(*other.params, replace(written, role="In")))
    with pytest.raises(VerifyError, match="hidden is written by gate_block_combine_hidden and used by"):
        verify(replace(second, sections=(hidden, broken)))


def test_parts_in_a_row_give_the_bits_of_a_split():
    """Parts added up by one program, and by a second launch: the same sums in the same order."""
    results = []
    for how in ("split:D:3", "parts:D:3"):
        made = call("gate_projections", FIRST + f" {how} warps:4 stages:2")
        memory = {n: np.array(x) for n, x in made.operands.items()}
        shape = {n: tuple(made.extents[d.text] for d in x.dims) for n, x in made.graph.tensors.items()}
        memory |= {x.name: interpret.poison(shape[x.name], x.dtype) for x in made.graph.outputs()}
        interpret.run(planned(made), memory, made.extents)
        results.append(memory)
    for x in made.graph.outputs():
        np.testing.assert_array_equal(results[0][x.name], results[1][x.name])
        assert np.isfinite(results[0][x.name]).all()


@pytest.mark.parametrize("depth", [3, 16, 20, 70, 300])
def test_any_depth(depth):
    """A part is one program's, however small it is: several of few elements were once taken by one."""
    fusion = DECLARATIONS["gate_block"]
    check("interpret", Call(fusion, operands(fusion, {"T": 3, "D": depth, "I": 5, "E": 7, "G": 1}, "float32", "normal", 3)))


def test_a_launch_numbers_the_programs_of_all_sections():
    """As many programs as the sections have together; a section's own come one after the other."""
    first, _ = planned(call("gate_block", FIRST + " split:D:3 warps:4 stages:2")).programs
    assert first.programs({"T": 19}) == sum(s.programs({"T": 19}) for s in first.sections)


def test_in_one_launch_the_residual_is_overwritten_last():
    """Loops over other outputs load it again."""
    fusion = DECLARATIONS["gate_block"]
    values = operands(fusion, {"T": 2, "D": 3, "I": 5, "E": 7, "G": 3})
    made = Call(fusion, values, schedule=Schedule.parse("tile:T:1 loop:D:2 loop:E:4 loop:G:2 loop:I:2 warps:1"))
    (program,) = planned(made).programs
    check("interpret", made)
    stored = [op.at.tensor for op in _stores(program.sections[0].body)]
    assert set(stored[-2:]) == {"hidden", "residual"}


def _stores(body):
    for op in body:
        if isinstance(op, tile.Loop):
            yield from _stores(op.body)
        elif isinstance(op, tile.Store):
            yield op


def test_a_dynamic_axis_need_not_be_in_the_first_section():
    """Its extent is the launch's argument all the same: emitting such a kernel once failed."""

    @fusion(x=In("A B"), y=In("T B"))
    def apart(x, y):
        return {"total": ml.sum(ml.f32(x), over="A"), "double": ml.f32(y) * 2.0}

    made = Call(apart, operands(apart, {"A": 5, "B": 7, "T": 3}, "float32"))
    (kernel,) = planned(made).programs
    assert [a.name for a in kernel.sections[0].axes] == ["A", "B"]
    assert [a.name for a in triton.arguments(kernel) if a.kind == "extent"] == ["T"]
    assert "apart_double(pid - 1, y_ptr, double_ptr, T, " in triton.emit(kernel)
