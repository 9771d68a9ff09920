"""The interpreter: bounds checks, poison, determinism, independence of rows, splits and nested loops."""

from dataclasses import replace

import break_memory
import numpy as np
import programs as good
import pytest

from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.rules import spread
from moekit.compile.schedule import Loop, Schedule, Split, Tile, Whole
from moekit.compile.tile import interpret
from moekit.compile.tile.layouts import contiguous, strided
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, contract, exp, f32, fusion, max, sum
from moekit.lang.dtypes import FLOATS, INTS, numpy_dtype
from moekit.testing import Call, check, operands, run, variants
from moekit.testing.draw import plain_case
from moekit.testing.probes import PROBES

SCHEDULES = {
    "silu_and_mul": ("tile:T:4 tile:I:16", "tile:T:1 tile:I:64"),
    "add_rms_norm": ("tile:T:4 whole:H:64", "tile:T:2 loop:H:16"),
    "gate_gemm": ("tile:T:16 loop:D:16 tile:P:16", "tile:T:4 whole:D:64 tile:P:4"),
    "topk_softmax": ("tile:T:2 whole:E:64 whole:K:8",),
}
SHAPES = {
    "silu_and_mul": {"I": 37},
    "add_rms_norm": {"H": 50},
    "gate_gemm": {"P": 35, "D": 50},
    "topk_softmax": {"E": 50},
}
CUTS = [(name, text) for name, texts in SCHEDULES.items() for text in texts]


def _run(name: str, values: dict, schedule: str) -> dict[str, np.ndarray]:
    params = {"k": 7} if name == "topk_softmax" else {}
    return run("interpret", Call(FUSIONS[name], values, params, schedule=Schedule.parse(schedule))).outputs


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, "bool"])
def test_poison_is_seen(dtype):
    """Memory nobody has written is NaN or a number that no test produces."""
    p = interpret.poison((2, 3), dtype)
    assert p.dtype == numpy_dtype(dtype)
    assert np.isnan(p.astype(np.float64)).all() if dtype in FLOATS else (p == p[0, 0]).all()


@pytest.mark.parametrize("kind", ["load", "store"])
def test_access_out_of_bounds_is_an_error(kind):
    """A program that verify would refuse for its masks cannot read or write beyond a tensor."""
    broken = break_memory.load_without_a_mask() if kind == "load" else break_memory.store_without_a_mask()
    memory = {"x": np.ones((7, 50), numpy_dtype("bfloat16")), "weight": np.ones(50, numpy_dtype("bfloat16"))}
    memory["out"] = interpret.poison((7, 50), "bfloat16")
    with pytest.raises(IndexError, match=f"norm: {kind.title()} of .* leaves its bounds"):
        interpret.execute(broken, memory, {"T": 7, "H": 50})


@pytest.mark.parametrize("backwards", [False, True])
def test_reading_what_another_program_writes_is_an_error(backwards):
    """In either order of programs, one sees what the other has stored, or the other overwrites what it has read."""
    memory = {"x": np.ones(3, np.float32), "state": np.ones((3, 6), np.float32)}
    interpret.execute(good.window_program(), dict(memory), {"T": 3}, backwards)
    with pytest.raises(
        IndexError, match=r"window: (Load of state comes after a store|Store of state to elements that another)"
    ):
        interpret.execute(break_memory.elements_that_another_program_stores(), memory, {"T": 3}, backwards)


def test_narrow_offsets_that_wrap_are_an_error():
    """An offset that is not computed in 64 bits must fit in 32."""
    graph = good.graph_of(good.norm, {"x": (3, 4), "weight": (4,)})
    values = np.ones((3, 4), np.float32)
    apart = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (3, 4), (4, 2**31 * 4))
    planned = plan(graph, None, contiguous(graph, {"T": 3}))
    memory = {"x": apart, "weight": np.ones(4, np.float32), "out": values.copy()}
    with pytest.raises(IndexError, match="norm: Load of x has an offset that passes 32 bits"):
        interpret.run(planned, memory, {"T": 3, "H": 4})


@pytest.mark.parametrize(("name", "schedule"), CUTS)
def test_row_does_not_depend_on_its_neighbours(name, schedule):
    """A slice of the batch gives bitwise the slice of the result, whatever T is and whatever the other rows hold."""
    values = operands(FUSIONS[name], SHAPES[name] | {"T": 11}, "bfloat16")
    whole = _run(name, values, schedule)
    batched = {n for n, s in FUSIONS[name].tensors.items() if s.shape.startswith("T")}
    other = {n: np.roll(x, 1, 0) if n in batched else x for n, x in values.items()}
    rolled = _run(name, other, schedule)
    for rows in (slice(0, 1), slice(3, 8), slice(10, 11)):
        part = _run(name, {n: x[rows] if n in batched else x for n, x in values.items()}, schedule)
        for out in whole:
            np.testing.assert_array_equal(part[out], whole[out][rows])
            np.testing.assert_array_equal(np.roll(rolled[out], -1, 0), whole[out])


@pytest.mark.parametrize(("name", "schedule"), CUTS)
def test_order_of_programs_does_not_matter(name, schedule, monkeypatch):
    """Programs of one launch share nothing: backwards they give the same bits."""
    values = operands(FUSIONS[name], SHAPES[name] | {"T": 9}, "float32")
    forwards = _run(name, values, schedule)
    product = interpret.itertools.product
    monkeypatch.setattr(interpret.itertools, "product", lambda *a: reversed(list(product(*a))))
    backwards = _run(name, values, schedule)
    for out, array in forwards.items():
        np.testing.assert_array_equal(array, backwards[out])


@pytest.mark.parametrize(("name", "schedule"), CUTS)
def test_strides_do_not_change_bits(name, schedule):
    """Layouts are no part of the numerics."""
    fusion, params = FUSIONS[name], {"k": 7} if name == "topk_softmax" else {}
    values = operands(fusion, SHAPES[name] | {"T": 5}, "float16")
    plain = _run(name, values, schedule)
    for layout in ("transposed padded", "strided", "shifted"):
        layouts = dict.fromkeys([*values, *plain], layout)
        outcome = run("interpret", Call(fusion, values, params, layouts, Schedule.parse(schedule)))
        assert not outcome.problems
        for out, array in plain.items():
            np.testing.assert_array_equal(outcome.outputs[out], array)


def _tower(x):
    x = x.astype(np.float64)
    return {"out": (x / np.abs(x).max((1, 2), keepdims=True) + x.sum(2, keepdims=True)).sum((1, 2))}


@fusion(_tower, x=In("T A B"))
def tower(x):
    """Reductions over two axes, one of which needs the other's result, and one over one axis between them."""
    v = f32(x)
    return sum(v / max(abs(v), over="A B") + sum(v, over="B"), over="A B")


@pytest.mark.parametrize("a", ["whole:A:8", "loop:A:2", "loop:A:4"])
@pytest.mark.parametrize("b", ["whole:B:16", "loop:B:4", "loop:B:16"])
def test_nested_loops(a, b):
    """Reductions over two looped axes, and results of one used in the next."""
    values = operands(tower, {"T": 3, "A": 5, "B": 13}, "float32")
    check("interpret", Call(tower, values, schedule=Schedule.parse(f"tile:T:2 {a} {b}")))


def _balanced(x):
    x = np.exp(x.astype(np.float64))
    return {
        "rows": x / x.sum(2, keepdims=True),
        "columns": x / x.sum(1, keepdims=True),
        "both": x / x.sum((1, 2), keepdims=True),
    }


@fusion(_balanced, x=In("T A B"))
def balanced(x):
    """Outputs along two axes, each normalised along one of them or both."""
    e = exp(f32(x))
    return {"rows": e / sum(e, over="B"), "columns": e / sum(e, over="A"), "both": e / sum(e, over="A B")}


@pytest.mark.parametrize("a", ["whole:A:8", "loop:A:2", "loop:A:8"])
@pytest.mark.parametrize("b", ["whole:B:16", "loop:B:4", "loop:B:16"])
def test_stores_in_nested_loops(a, b):
    """A sum over an axis inside a loop over the same axis starts from the beginning."""
    values = operands(balanced, {"T": 3, "A": 5, "B": 13}, "float32")
    check("interpret", Call(balanced, values, schedule=Schedule.parse(f"tile:T:2 {a} {b}")))


def _chain(x, y, z):
    x, y, z = (v.astype(np.float64) for v in (x, y, z))
    return {"out": np.einsum("tj,tj->t", x @ y.T, z), "middle": (x @ y.T).max(-1)}


@fusion(_chain, x=In("T K"), y=In("J K"), z=In("T J"))
def chain(x, y, z):
    """A contraction inside a contraction: loops over J and, within, over K."""
    middle = contract(x, y, over="K")
    return {"out": contract(middle, z, over="J"), "middle": cast(max(middle, over="J"), x.dtype)}


@pytest.mark.parametrize(
    "text", ["tile:T:2 loop:K:4 loop:J:8", "tile:T:16 loop:K:16 loop:J:16", "tile:T:4 whole:K:32 loop:J:4"]
)
def test_contraction_of_a_contraction(text):
    """The inner loop runs anew for each block of the outer one."""
    check("interpret", Call(chain, operands(chain, {"T": 5, "K": 21, "J": 19}), schedule=Schedule.parse(text)))


@pytest.mark.parametrize("wide", [True, False])
def test_offsets_past_two_to_the_31(tmp_path, wide, monkeypatch):
    """A stride of 2³¹ elements on an axis of two reaches memory that only a 64-bit offset finds.

    Along the dynamic axis offsets are wide even where nothing is known of the strides, and with `verify` looking away.
    """
    monkeypatch.setattr("moekit.compile.plan.verify", lambda program: None)
    values = operands(good.norm, {"T": 2, "H": 8}, "float32")
    strides = (2**31 + 8, 1)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((strides[0] + 8) * 4)
    arena = np.memmap(path, np.float32, "r+")
    memory = {"x": np.lib.stride_tricks.as_strided(arena, (2, 8), (strides[0] * 4, 4)), "weight": values["weight"]}
    memory["x"][...] = values["x"]
    memory["out"] = interpret.poison((2, 8), "float32")
    graph = good.graph_of(good.norm, {"x": (2, 8), "weight": (8,)})
    layouts = {n: strided(a.shape, _steps(a), (None,) * a.ndim, (), a.itemsize) for n, a in memory.items()}
    assert layouts["x"].wide
    layouts["x"] = replace(layouts["x"], wide=wide)
    planned = plan(graph, None, layouts)
    assert all(op.at.wide == (True, wide) for op in good.operations(planned.programs[0], t.Load) if op.at.tensor == "x")
    interpret.run(planned, memory, {"T": 2, "H": 8})
    expected = run("interpret", Call(good.norm, values)).outputs["out"]
    np.testing.assert_array_equal(memory["out"], expected)


def _steps(a: np.ndarray) -> tuple[int, ...]:
    return tuple(s // a.itemsize for s in a.strides)


@pytest.mark.parametrize("parts", [2, 3, 5, 16])
def test_split_gives_the_same_bits_every_time(parts):
    """Partials are added in one fixed order, empty parts included."""
    values = operands(FUSIONS["gate_gemm"], {"T": 5, "P": 20, "D": 70})
    call = Call(FUSIONS["gate_gemm"], values)
    call = replace(call, schedule=spread(call.graph, f"tile:T:4 loop:D:8 tile:P:8 split:D:{parts}"))
    first, second = (run("interpret", call).outputs["out"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_scratch_is_fully_written():
    """What one launch leaves for the next has no poison in it, even for parts without elements."""
    graph = good.graph_of(FUSIONS["gate_gemm"], {"x": (3, 20), "packed": (5, 20)})
    values = operands(FUSIONS["gate_gemm"], {"T": 3, "P": 5, "D": 20})
    planned = good.planned(graph, spread(graph, "tile:T:4 loop:D:8 tile:P:8 split:D:8"))
    memory = values | {s.name: interpret.poison(s.shape({"T": 3}), s.dtype) for s in planned.scratch}
    interpret.execute(planned.programs[0], memory, {"T": 3})
    assert all(np.isfinite(memory[s.name]).all() for s in planned.scratch)


def test_program_text_names_what_the_declaration_names():
    """The text of a program is readable: tensors, axes, masks and loops by name."""
    text = str(good.looped_program())
    for part in ("program norm(", "axis H: 50 in loop blocks of 16", "axis T: dynamic in grid blocks of 4",
                 ":h_start over H (", "h_mask: bool[H] = InBounds(value=", "Store(at=out["):  # fmt: skip
        assert part in text
    assert str(good.looped_program()) == text


def test_variants_cover_every_mode():
    """Between them the schedules of the suite hold axes whole, loop over them and split them."""
    graph = good.graph_of(FUSIONS["gate_gemm"], {"x": (5, 70), "packed": (35, 70)})
    found = [s for s in variants(graph).values() if s is not None]
    assert {type(d) for s in found for d in s.launches[0].sections[0].axes} == {Tile, Whole, Loop}
    assert any(isinstance(s.launches[0].cut, Split) for s in found)


def _told(kind: type, execute):
    """`execute`, after which what numpy has made is compared with what the program says that it is."""

    def told(run, op):
        made = execute(run, op)
        for value, array in zip(t.results(op), made if isinstance(made, list) else [made], strict=True):
            assert np.shape(array) == run.program.block(value.axes), op
            assert kind in (t.Extent, t.Elements) or array.dtype == numpy_dtype(value.dtype), op
        return made

    return told


def test_what_an_operation_makes_is_of_the_type_that_the_program_says(monkeypatch):
    """What writes operations and the rule that checks them ask one table of types, of which neither sees a fault."""
    for kind in interpret.EXECUTE.keys() - {t.Store, t.Prefetch, t.Barrier}:
        monkeypatch.setitem(interpret.EXECUTE, kind, _told(kind, interpret.EXECUTE[kind]))
    for name in (*FUSIONS, *PROBES):
        sizes = {"T": 5, "D": 40, "I": 9, "E": 21, "K": 2, "V": 4, "Dk": 8, "Dv": 8, "H": 21, "A": 6, "B": 5}
        check("interpret", plain_case(name, sizes, "bfloat16"))
    check("interpret", plain_case("gate_projections", {"T": 67, "D": 45, "I": 21, "E": 20}, "bfloat16", schedule="tall"))
