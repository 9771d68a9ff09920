"""Folds over the first elements of an axis, as many as an operand says: what is folded, and how far a program goes for it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from moekit.backends import triton as emitter
from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.schedule.directives import Schedule
from moekit.compile.tile import interpret
from moekit.compile.tile.layouts import contiguous
from moekit.errors import DeclarationError, ShapeError
from moekit.lang import In, cast, contract, extent, f32, fusion, max, min, softmax_sum, sum, where
from moekit.testing import Call, implementations, run

LENGTHS = In("T", dtype=("int32", "int64"))


def _kept(x, lengths, fill):
    return np.where(
        np.arange(x.shape[1])[None, :, None] < np.asarray(lengths, np.int64)[:, None, None], x.astype(np.float64), fill
    )


def reference(x, lengths):
    """float64, row by row; nothing past a length is looked at."""
    found = {n: np.full((x.shape[0], x.shape[2]), e) for n, e in (("total", 0.0), ("largest", -np.inf), ("smallest", np.inf))}
    for r, n in enumerate(np.clip(lengths.astype(np.int64), 0, x.shape[1])):
        if n:
            rows = x[r, :n].astype(np.float64)
            found["total"][r], found["largest"][r], found["smallest"][r] = rows.sum(0), rows.max(0), rows.min(0)
    return found


@fusion(reference, x=In("T L H", dtype="float32"), lengths=LENGTHS)
def extremes(x, lengths):
    """Sum, maximum and minimum of the first elements along L."""
    return {"total": sum(x, "L", upto=lengths), "largest": max(x, "L", upto=lengths), "smallest": min(x, "L", upto=lengths)}


def product_reference(x, w, lengths):
    """float64, row by row."""
    ends = np.clip(lengths.astype(np.int64), 0, x.shape[1])
    return {"out": np.stack([x[r, :n].astype(np.float64).T @ w[:n].astype(np.float64) for r, n in enumerate(ends)])}


@fusion(product_reference, x=In("T D M"), w=In("D N"), lengths=LENGTHS)
def ragged_product(x, w, lengths):
    """x[t]·w over the first elements of D, by row."""
    return {"out": contract(x, w, "D", upto=lengths)}


LOOPED = "tile:T:1 loop:L:16 tile:H:8 warps:1 stages:1"
SCHEDULES = (LOOPED, "tile:T:1 whole:L:128 tile:H:8 warps:1 stages:1", "tile:T:4 loop:L:16 tile:H:8 warps:1 stages:1",
             "tile:T:1 loop:L:8 parts:L:3 tile:H:16 warps:1 stages:1", "tile:T:1 loop:L:1 tile:H:8 warps:1 stages:1",
             "tile:L.part:1 tile:T:1 loop:L:8 tile:H:16 warps:1 stages:1 split:L:3 then "
             "loop:L.part:1 tile:T:1 tile:H:16 warps:1 stages:1")  # fmt: skip
ENDS = np.array([0, 1, 15, 16, 17, 100, 99, -3, 1000])


def given(kind=np.int32, size=100):
    """Rows whose elements past their length are NaN and infinite."""
    rng = np.random.default_rng(1)
    ends = (
        ENDS if kind == np.int32 else ENDS * np.where(ENDS < 0, 2**40, 2**33) // np.where(abs(ENDS) > 500, 1, 2**33)
    ).astype(kind)
    x = rng.standard_normal((len(ends), size, 13)).astype(np.float32)
    past = np.arange(size)[None, :, None] >= np.clip(ends, 0, size)[:, None, None]
    return {"x": np.where(past, np.where(np.arange(13) % 2, np.nan, np.inf), x).astype(np.float32), "lengths": ends}


def outputs(fusion, values, schedule=None):
    """What the interpreter makes, from poison."""
    binding = fusion.bind({n: v.shape for n, v in values.items()}, {n: v.dtype.name for n, v in values.items()}, {})
    graph, sizes = fusion.trace(binding), dict(binding.sizes)
    made = plan(graph, Schedule.parse(schedule) if schedule else None, contiguous(graph, sizes), None)
    outs = {x.name: interpret.poison(tuple(sizes[a] for a in x.axes), x.dtype) for x in graph.outputs()}
    interpret.run(made, {**values, **outs}, sizes)
    return outs, made


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_the_first_elements_are_folded(schedule, kind):
    values = given(kind)
    got, _ = outputs(extremes, values, schedule)
    for name, expected in reference(**values).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-5, err_msg=name)


def test_a_program_goes_as_far_as_its_row(monkeypatch):
    """Turns, counted: ceil(length / block), whatever the capacity; and with several rows a program all of them."""
    turns = []
    loop = interpret.Program.loop

    def counted(self, op):
        ran = []
        body = self.ops
        self.ops = lambda ops: (ran.append(1), body(ops))[1] if ops is op.body else body(ops)
        try:
            return loop(self, op)
        finally:
            self.ops = body
            turns.append(len(ran))

    monkeypatch.setitem(interpret.EXECUTE, t.Loop, counted)
    outputs(extremes, given(), LOOPED)
    assert turns[::2] == [0, 1, 1, 1, 2, 7, 7, 0, 7]
    turns.clear()
    outputs(extremes, given(), SCHEDULES[2])
    assert set(turns) == {7}


def test_bits_do_not_depend_on_how_far_a_program_goes():
    """The whole walk behind masks and the short one give the same bits, and so does a larger capacity."""
    values = given()
    short, whole = (outputs(extremes, values, s)[0] for s in (LOOPED, SCHEDULES[2]))
    wide = given(size=300)
    wide["x"][:, :100] = values["x"]
    wide["lengths"] = np.clip(values["lengths"], 0, 100)
    more, _ = outputs(extremes, wide, LOOPED)
    for name, bits in short.items():
        np.testing.assert_array_equal(bits.view(np.int32), whole[name].view(np.int32))
        np.testing.assert_array_equal(bits.view(np.int32), more[name].view(np.int32))


@pytest.mark.parametrize("schedule", ["tile:T:1 loop:D:16 tile:M:16 tile:N:16 warps:4 stages:2", None])
def test_a_product_over_the_first_elements(schedule):
    rng = np.random.default_rng(2)
    values = {"x": rng.standard_normal((5, 40, 12)).astype(np.float32), "w": rng.standard_normal((40, 20)).astype(np.float32),
              "lengths": np.array([40, 0, 7, 16, 33], np.int32)}  # fmt: skip
    values["x"][1], values["x"][2, 7:] = np.nan, np.inf
    got, made = outputs(ragged_product, values, schedule)
    np.testing.assert_allclose(got["out"], product_reference(**values)["out"], rtol=1e-5, atol=1e-5)
    if schedule:
        assert any(isinstance(op, t.Dot) for op, _ in t.walk(made.programs[0].body))


def two_ends_reference(x, lengths):
    """float64: all of the axis, and the first elements of it."""
    return {"whole": x.astype(np.float64).sum(1), "first": reference(x, lengths)["total"]}


@fusion(two_ends_reference, x=In("T L H", dtype="float32"), lengths=LENGTHS)
def two_ends(x, lengths):
    """Two sums of one loop, which do not end at one element."""
    return {"whole": sum(x, "L"), "first": sum(x, "L", upto=lengths)}


@pytest.mark.parametrize("tile", ["T:1", "T:4"])
@pytest.mark.parametrize("declared", [extremes, two_ends])
def test_the_last_part_has_what_is_left(declared, tile):
    """Blocks divide the axis and parts of 16 do not: nothing past its end is read, whatever ends where."""
    values = given(size=40)
    values["x"] = np.nan_to_num(values["x"], posinf=0)
    first = f"tile:{tile} loop:L:8 tile:H:16 warps:1 stages:1"
    then = f"loop:L.part:1 tile:{tile} tile:H:16 warps:1 stages:1"
    for schedule in (f"{first} parts:L:3:16", f"tile:L.part:1 {first} split:L:3:16 then {then}"):
        got, _ = outputs(declared, values, schedule)
        for name, expected in declared.reference(**values).items():
            np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("implementation", implementations())
def test_every_implementation(implementation, kind):
    """Lengths past 2³¹, too, which JAX has where it is told to."""
    values = given(kind)
    got = run(implementation, Call(extremes, values)).outputs
    for name, expected in reference(**values).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-5, err_msg=name)


def test_the_text_says_it():
    """A loop's range ends at the row's length."""
    _, made = outputs(extremes, given(), LOOPED)
    text = emitter.emit(made.programs[0])
    assert "l_end = tl.maximum(tl.minimum(lengths, 100), 0)" in text
    assert "in range(0, l_end, 16):" in text


SCRIPT = """
import sys
from moekit.testing import Call, check
from tests.compile import test_lengths as here

for kind in (here.np.int32, here.np.int64):
    values = here.given(kind)
    for schedule in (None, *here.SCHEDULES):
        for layout in ("dense", "strided", "transposed padded"):
            schedule = here.Schedule.parse(schedule) if isinstance(schedule, str) else schedule
            check("triton-interpreter", Call(here.extremes, values, {}, {"x": layout, "lengths": layout}, schedule))
"""


def test_emitted_triton_in_its_interpreter():
    """A process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_compiled_for_an_h200():
    """A run-time end in a loop of products, too."""
    pytest.importorskip("triton")
    from tests.backends.sm_90 import compiled

    values = {"x": np.zeros((5, 64, 32), np.float16), "w": np.zeros((64, 32), np.float16), "lengths": np.zeros(5, np.int32)}
    schedule = "tile:T:1 loop:D:16 tile:M:16 tile:N:16 warps:4 stages:3"
    for declared, operands, how in ((extremes, given(), LOOPED), (extremes, given(), None), (ragged_product, values, schedule)):
        for program in outputs(declared, operands, how)[1].programs:
            assert compiled(program).asm["ptx"]


def test_what_is_refused():
    shapes = {"x": (3, 4, 5), "lengths": (3,)}

    def trace(body, **kinds):
        declared = fusion(None, x=In("T L H"), lengths=In("T", dtype=("int32", "float32")))(body)
        return declared.trace(declared.bind(shapes, {"x": "float32", "lengths": "int32", **kinds}, {}))

    def two(x, lengths):
        return {"out": sum(x, "L H", upto=lengths)}

    def floats(x, lengths):
        return {"out": sum(x, "L", upto=lengths)}

    def along(x, lengths):
        return {"out": sum(x, "L", upto=cast(f32(x), "int32"))}

    with pytest.raises(DeclarationError, match="upto= counts elements of one axis, but over='L H' names several"):
        trace(two)
    with pytest.raises(DeclarationError, match="upto= needs an integer that does not vary over L"):
        trace(floats, lengths="float32")
    with pytest.raises(DeclarationError, match="upto= needs an integer that does not vary over L"):
        trace(along)


def wanted_reference(x, w, wanted):
    """float64, row by row."""
    out = np.zeros((x.shape[0], x.shape[2], w.shape[1]))
    for r in np.flatnonzero(wanted > 0):
        out[r] = x[r].astype(np.float64).T @ w.astype(np.float64)
    return {"out": out}


@fusion(wanted_reference, x=In("T D M"), w=In("D N"), wanted=In("T", dtype="int32"))
def wanted_product(x, w, wanted):
    """x[t]·w where it is wanted, else nothing."""
    return {"out": contract(x, w, "D", upto=where(wanted > 0, extent("D"), 0))}


@pytest.mark.parametrize("tile", ["T:1", "T:2"])
def test_all_of_a_product_or_nothing(tile):
    """A program that does not want its product reads nothing of it, and one that does has no choice in its loop."""
    rng = np.random.default_rng(4)
    values = {"x": rng.standard_normal((5, 40, 12)).astype(np.float32), "w": rng.standard_normal((40, 20)).astype(np.float32),
              "wanted": np.array([1, 0, 3, 0, -2], np.int32)}  # fmt: skip
    values["x"][values["wanted"] <= 0] = np.nan
    got, made = outputs(wanted_product, values, f"tile:{tile} loop:D:16 tile:M:16 tile:N:16 warps:4 stages:2")
    np.testing.assert_allclose(got["out"], wanted_reference(**values)["out"], rtol=1e-5, atol=1e-5)
    (loop,) = (op for op, _ in t.walk(made.programs[0].body) if isinstance(op, t.Loop))
    assert (loop.end is not None) == (tile == "T:1")
    assert any(isinstance(op, t.Where) and "D" in op.condition.axes for op in loop.body) == (tile == "T:2")


@fusion(reference, x=In("T L H", dtype="float32"), lengths=LENGTHS, dynamic="T L")
def far_extremes(x, lengths):
    """The same along an axis whose size is known at a call only."""
    return {"total": sum(x, "L", upto=lengths), "largest": max(x, "L", upto=lengths), "smallest": min(x, "L", upto=lengths)}


def declared_weighed(dynamic):
    """Sums weighed by scores, to an end and to the axis's."""

    @fusion(None, scores=In("T L", dtype="float32"), values=In("T L H", dtype="float32"), lengths=LENGTHS, dynamic=dynamic)
    def weighed(scores, values, lengths):
        return {"ended": softmax_sum(scores, values, "L", upto=lengths), "whole": softmax_sum(scores, values, "L")}

    return weighed


EMPTY = np.zeros((2, 0, 3), np.float32)


@pytest.mark.parametrize("implementation", implementations())
def test_an_axis_of_no_elements(implementation):
    """Of nothing a maximum with an end is -inf, a minimum inf, a weighed sum zero, as of rows that have no elements.

    PyTorch's face takes no elements along a dynamic axis alone.
    """
    ends, known = {"lengths": np.array([0, 5], np.int32)}, implementation.split()[0] not in ("eager", "triton")
    for declared in (extremes, far_extremes) if known else (far_extremes,):
        got = run(implementation, Call(declared, {"x": EMPTY, **ends})).outputs
        for name, wanted in {"total": 0.0, "largest": -np.inf, "smallest": np.inf}.items():
            np.testing.assert_array_equal(got[name], np.full((2, 3), wanted, np.float32))
    for dynamic in ("T", "T L") if known else ("T L",):
        got = run(implementation, Call(declared_weighed(dynamic), {"scores": EMPTY[..., 0], "values": EMPTY, **ends})).outputs
        assert not any(out.any() for out in got.values())


@pytest.mark.parametrize("dynamic", ["T", "T L"])
def test_of_nothing_there_is_no_largest(dynamic):
    """Without an end a maximum is refused, whether or not another has one."""
    declared = fusion(None, x=In("T L H", dtype="float32"), lengths=LENGTHS, dynamic=dynamic)(
        lambda x, lengths: max(x, "L", upto=lengths) + max(x, "L")
    )
    with pytest.raises(ShapeError, match="max over L needs at least one element, got L = 0"):
        run("numpy", Call(declared, {"x": EMPTY, "lengths": np.array([0, 5], np.int32)}))
