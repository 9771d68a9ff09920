"""Memory asked for early: a store comes before the first sum where its value is there and nobody has still to read."""

import programs as good
import pytest

from moekit.compile import tile as t
from moekit.compile.passes.motion import motion
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS


def _norm(schedule: str, columns: int = 40) -> list[t.Op]:
    row = {"x": (3, columns), "residual": (3, columns), "weight": (columns,)}
    graph = good.graph_of(FUSIONS["add_rms_norm"], row, "bfloat16")
    layouts = {n: t.Strided(("any",) * len(x.dims)) for n, x in graph.tensors.items()}
    return list(plan(graph, Schedule.parse(schedule), layouts).programs[0].body)


def _order(ops: list[t.Op]) -> str:
    """L: a load, R: a sum, S and the tensor's first letter: a store."""
    letters = {t.Load: "L", t.Reduce: "R"}
    return " ".join(
        f"S{o.at.tensor[0]}" if isinstance(o, t.Store) else letters[type(o)] for o in ops if type(o) in (*letters, t.Store)
    )


def test_a_sum_that_is_kept_is_stored_while_its_squares_are_added_up():
    """The output waits for the sum over the row, what becomes of the residual does not; all loads come first."""
    assert _order(_norm("tile:T:1 whole:H:1024 warps:4 stages:1", 1000)) == "L L L Sr R So"


def test_a_block_that_lanes_may_hold_twice_is_stored_after_the_sum():
    """A copy of an element may be loaded late, and must not find what another lane has written over it."""
    assert _order(_norm("tile:T:1 whole:H:64 warps:16 stages:1")) in ("L L L R So Sr", "L L L R Sr So")


def test_in_a_loop_nothing_is_stored_before_the_loop_that_loads_it():
    """The second pass loads the residual again, so it is stored there."""
    ops = _norm("tile:T:1 loop:H:16 warps:1 stages:2")
    assert not any(isinstance(op, t.Store) for op in ops)
    assert _order(list(next(o for o in reversed(ops) if isinstance(o, t.Loop)).body)) == "L L L So Sr"


@pytest.mark.parametrize(
    ("dtype", "byte", "order"),
    [("float8_e4m3fn", 1, "L L R R"), ("float8_e4m3fn", 2, "L R L R"), ("bfloat16", 1, "L R L R"), ("float32", 1, "L R L R")],
)
def test_loads_come_early_while_they_take_few_registers(dtype, byte, order):
    """Two blocks of 256 elements a lane: of a byte each, both are on their way before the first sum where a byte is half."""
    h, x, y = t.Value(0, "int32", ("H",)), t.Value(1, dtype, ("H",)), t.Value(2, dtype, ("H",))
    ops: list = [t.Elements(h, "H")]
    for number, (tensor, value) in enumerate({"a": x, "b": y}.items(), 3):
        access = t.Access(tensor, (t.Index.of(h),), (), (False,))
        ops += [t.Load(value, access), t.Reduce(t.Value(number, "float32"), "sum", value, "H")]
    axes = (t.AxisBlock("H", 2**15, 2**15, "whole"),)
    assert _order(list(motion(t.TileProgram("made", (), axes, (), tuple(ops), 4, 1), byte).body)) == order


@pytest.mark.parametrize(
    ("read", "again", "order"),
    [("h", "", "L Sa R"), ("g", "", "L R Sa"), ("h", "total", "L R L Sa"), ("h", "h", "L L Sa R")],
    ids=str,
)
def test_what_is_read_elsewhere_or_later_is_stored_last(read, again, order):
    """Of a tensor that is loaded by other indices than it is stored by, or once more, lanes may not have read all."""
    h, g, x, y = (t.Value(i, d, ("H",)) for i, d in enumerate(("int32", "int32", "float32", "float32")))
    total = t.Value(4, "float32")

    def load(out: t.Value, index: t.Value) -> t.Load:
        return t.Load(out, t.Access("a", (t.Index.of(index),), (), (False,)))

    ops: list = [t.Elements(h, "H"), t.Elements(g, "H"), load(x, {"h": h, "g": g}[read]), t.Reduce(total, "sum", x, "H")]
    ops += [load(y, {"h": h}.get(again, total))] if again else []
    ops.append(t.Store(t.Access("a", (t.Index.of(h),), (), (False,)), x))
    axes = (t.AxisBlock("H", 1024, 1024, "whole"),)
    assert _order(list(motion(t.TileProgram("made", (), axes, (), tuple(ops), 4, 1)).body)) == order
