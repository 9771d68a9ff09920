"""The list of passes: a program keeps the rules after each of them, and says the same as before it."""

import ast
import importlib
import re
import sys

import numpy as np
import programs as good
import pytest

from moekit.backends import triton
from moekit.compile import tile as t
from moekit.compile.passes import PASSES, watching
from moekit.compile.passes.apart import rights
from moekit.compile.passes.helpers import helpers
from moekit.compile.passes.legalise import legalise
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.targets import TARGETS
from moekit.compile.tile import interpret
from moekit.compile.tile.verify import RULES, check, facts_of
from moekit.errors import FileError, VerifyError
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, contract, f32, fusion, slice
from moekit.lang.fusion import Fusion
from moekit.testing import Call, operands

NORM_SHAPES = {"x": (7, 50), "weight": (50,), "out": (7, 50)}
SIZES = {"T": 19, "D": 70, "I": 9, "E": 21, "G": 1, "H": 40, "K": 2, "V": 4, "Dk": 8, "Dv": 8, "P": 35}
ORDER = ["nest", *PASSES]
MASKED = ORDER.index("masks")
DERIVED = {"memory_masked", "reductions_masked", "wide_offsets"}  # what masks and widths are for


@fusion(None, a=In("T H", dtype="bfloat16"), b=In("T H", dtype="float16"))
def halves_of_two_kinds(a, b):
    """A bfloat16 that is rounded to float16 later, a negative and a literal -0.0."""
    return {"out": cast(f32(a) + f32(b), "float16"), "minus": -f32(a), "zero": f32(b) * -0.0}


@fusion(None, x=In("T D"), w=In("4*I D"))
def two_of_four(x, w):
    """Two outputs, each of two products with a part of a weight."""
    product = lambda start: contract(x, slice(w, "4*I", start, 32, "I"), over="D")  # noqa: E731
    return {"one": product(0) * product(64), "two": product(32) * product(96)}


def after_passes(f: Fusion, schedule: str | None, sizes: dict = SIZES) -> tuple[Call, list[tuple[str, t.TileProgram]]]:
    """A call, and its program after every pass with the pass's name; those of all sections one after the other."""
    params = {"k": 3} if "k" in f.params else {}
    axes = {a for s in f.tensors.values() for d in s.dims for _, a in d.terms}
    call = Call(f, operands(f, {a: n for a, n in sizes.items() if a in axes}, "float16"), params)
    layouts = {n: t.Strided((*["any"] * (len(x.dims) - 1), "unit")) for n, x in call.graph.tensors.items()}
    seen: list[tuple[str, t.TileProgram]] = []
    with watching(lambda name, program: seen.append((name, program))):
        plan(call.graph, Schedule.parse(schedule) if schedule else None, layouts)
    return call, seen


CASES = [
    pytest.param(FUSIONS["add_rms_norm"], None, id="norm"),
    pytest.param(FUSIONS["add_rms_norm"], "tile:T:2 loop:H:16 warps:1", id="norm in loops"),
    pytest.param(FUSIONS["topk_softmax"], None, id="top_k"),
    pytest.param(FUSIONS["delta_rule_step"], None, id="softplus"),
    pytest.param(FUSIONS["gate_gemm"], "tile:T:16 loop:D:16 tile:P:16 parts:D:2", id="product in parts"),
    pytest.param(halves_of_two_kinds, None, id="workarounds"),
]


@pytest.mark.parametrize(("f", "schedule"), CASES)
def test_every_pass_keeps_the_rules(f, schedule):
    """All of them once masks are there, before that those that masks and widths are not for."""
    _, seen = after_passes(f, schedule)
    assert [name for name, _ in seen] == ORDER * (len(seen) // len(ORDER))
    for name, program in seen:
        facts = facts_of(program)
        for rule in RULES if ORDER.index(name) >= MASKED else RULES.keys() - DERIVED:
            check(facts, rule)


def test_a_rule_does_not_ask_what_the_pass_asks(monkeypatch):
    """How wide an offset is: where the pass is told that all are narrow, the rule says that they may not be."""
    wide = importlib.import_module("moekit.compile.passes.masks").wide
    for module in [m for name, m in sys.modules.items() if name.startswith("moekit.") and getattr(m, "wide", None) is wide]:
        monkeypatch.setattr(module, "wide", lambda program, param: (False,) * len(param.axes))
    with pytest.raises(VerifyError, match="wide offsets: T × its stride may pass"):
        good.norm_program()


@pytest.mark.parametrize(("f", "schedule"), CASES)
def test_no_pass_after_the_masks_changes_a_bit(f, schedule):
    """The interpreter's results are those of the program after the pass before."""
    call, seen = after_passes(f, schedule)
    shapes = {n: tuple(call.extents[d.text] for d in x.dims) for n, x in call.graph.tensors.items() if n not in call.operands}
    results = []
    for name, program in seen[: len(ORDER)]:
        if ORDER.index(name) >= MASKED:
            memory = {n: np.array(x) for n, x in call.operands.items()}
            memory |= {n: interpret.poison(shape, call.graph.tensors[n].dtype) for n, shape in shapes.items()}
            interpret.execute(program, memory, call.extents)
            results.append(memory)
    for later in results[1:]:
        for n, array in results[0].items():
            np.testing.assert_array_equal(later[n].view(np.uint8), array.view(np.uint8))


def test_workarounds_are_for_the_targets_that_need_them():
    """One program, three workarounds for Triton, two for Pallas; where nothing needs one nothing changes."""
    _, seen = after_passes(halves_of_two_kinds, None)
    (before,) = [program for name, program in seen if name == "flatten"]
    assert set(TARGETS) == {"triton", "pallas", "mosaic"}
    for target, negative_zeros in (("triton", 0), ("pallas", 1)):
        program = legalise(before, target)
        assert not [op for op in good.operations(program, t.Unary) if op.op == "neg"]
        zeros = [op.value for op in good.operations(program, t.Const) if op.value == 0]
        assert [np.signbit(z) for z in zeros].count(True) == negative_zeros
        casts = {(op.value.dtype, op.out.dtype) for op in good.operations(program, t.Cast)}
        assert ("bfloat16", "float32") not in casts
    plain = good.norm_program()
    assert legalise(plain, "triton") == plain


def test_a_trace_has_a_file_for_every_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEKIT_TRACE", str(tmp_path))
    program = good.norm_program()
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"norm.{program.digest}.triton.")
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:02}.{name}.txt" for i, name in enumerate(ORDER)]
    assert (folder / f"{len(ORDER) - 1:02}.{ORDER[-1]}.txt").read_text() == f"{program}\n"


def test_traces_of_two_targets_and_two_schedules_stand_side_by_side(tmp_path, monkeypatch):
    """Four programs of one name and graph: a folder each."""
    graph = good.graph_of(good.norm, {"x": (7, 50), "weight": (50,)})
    whole = {n: t.Viewed(n, s, tuple(range(len(s))), (0,) * len(s), (1,) * len(s)) for n, s in NORM_SHAPES.items()}
    monkeypatch.setenv("MOEKIT_TRACE", str(tmp_path))
    for text in ("tile:T:1 whole:H:64", "tile:T:2 whole:H:64"):
        good.planned(graph, text)
        plan(graph, Schedule.parse(text), whole, {"T": 7})
    assert sorted(p.name.split(".")[2] for p in tmp_path.iterdir()) == ["pallas", "pallas", "triton", "triton"]


def test_traces_of_schedules_that_differ_after_the_first_pass_stand_side_by_side(tmp_path, monkeypatch):
    """What is asked for ahead is nothing that the first program says."""
    graph = good.graph_of(FUSIONS["gate_gemm"], {"x": (20, 256), "packed": (64, 256)}, "bfloat16")
    monkeypatch.setenv("MOEKIT_TRACE", str(tmp_path))
    for text in ("", "prefetch:packed"):
        good.planned(graph, f"tile:T:16 loop:D:64 tile:P:16 {text} dependent")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_trace_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    """One sentence with the folder's name."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEKIT_TRACE", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"file/norm\..* cannot be made: Not a directory"):
        good.norm_program()


def test_sections_that_begin_elsewhere_are_one_helper():
    """The two halves of a weight; a router has other columns and stands for itself."""
    shapes = {"x": (20, 2048), "gate_up": (64, 2048), "router": (40, 2048), "shared_gate": (1, 2048)}
    graph = good.graph_of(FUSIONS["gate_projections"], shapes, "bfloat16")
    kernel = good.planned(graph).programs[0]
    found = [(h.section.name, len(h.calls), [starts for _, starts in h.calls]) for h in helpers(kernel)]
    assert found[0] == ("gate_projections_partial_0_1", 2, [(0,), (32,)])
    assert [calls for _, calls, _ in found] == [2, 1, 1]
    text = triton.emit(kernel)
    assert "gate_up_first: tl.constexpr" in text
    assert "def gate_projections_partial_1(" not in text
    assert text.count(" gate_projections_partial_0_1(\n") == 3  # its definition and two calls
    body = text[text.index("def gate_projections_partial_0_1(") : text.index("def gate_projections_partial_2(")]
    assert "partial_ptr" in body
    assert not {"partial_0_ptr", "partial_1_ptr", "gate_acc", "up_acc"} & set(re.findall(r"\w+", body))


def test_a_helper_is_told_of_each_beginning_by_a_name_of_its_own():
    """Two outputs, each of products with two parts of one weight."""
    graph = good.graph_of(two_of_four, {"x": (20, 256), "w": (128, 256)}, "bfloat16")
    blocks = "tile:T:16 loop:D:64 tile:I:16"
    kernel = good.planned(graph, f"one({blocks}) two({blocks})").programs[0]
    (helper,) = helpers(kernel)
    assert [starts for _, starts in helper.calls] == [(0, 64), (32, 96)]
    assert [*helper.starts.values()] == ["w_first", "w_first_1"]
    ast.parse(triton.emit(kernel))


def test_a_right_operand_has_elements_and_masks_of_its_own():
    """Where threads are told what they hold: columns of the weight, and no others, are made twice."""
    shapes = {"hidden": (3, 40), "activated": (3, 24), "down": (40, 24), "share": (3, 1)}
    graph = good.graph_of(FUSIONS["down_combine"], shapes, "bfloat16")
    whole = {n: t.Viewed(n, s, tuple(range(len(s))), (0,) * len(s), (1,) * len(s)) for n, s in shapes.items()}
    by = {target: plan(graph, None, whole, {"T": 3}, target).programs[0] for target in ("pallas", "mosaic")}
    made = {target: [op.axis for op, _ in t.walk(p.body) if isinstance(op, t.Elements)] for target, p in by.items()}
    assert sorted(made["mosaic"]) == sorted([*made["pallas"], "H"])
    (product,) = [op for op, _ in t.walk(by["mosaic"].body) if isinstance(op, t.Dot)]
    own = rights(by["mosaic"])
    assert product.right in own
    for op, _ in t.walk(by["mosaic"].body):
        mixed = {*t.operands(op)} & own and not {*t.results(op)} <= own
        assert not mixed or op == product
