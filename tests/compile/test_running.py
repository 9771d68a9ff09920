"""Axes whose size follows from others, running sums along run-time axes, and what is placed: in every implementation."""

import numpy as np
import pytest
from programs import graph_of, planned, running

from moekit.compile.rules import heuristic
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.compile.tile.interpret import execute as launch
from moekit.compile.tile.interpret import poison
from moekit.compile.tile.interpret import run as execute
from moekit.errors import DeclarationError, ShapeError
from moekit.lang import In, cumsum, fusion, gather, iota, place, size, where
from moekit.testing import Call, implementations, run


@fusion(x=In("T K"), dynamic="T B", axes={"B": lambda T, K, more: T * K + more})
def flat(x, more: int = 0):
    """Rows one after the other along an axis of their own, and some zeros."""
    b = iota("B")
    return gather(gather(x, where(b < size("K") * (b // size("K") + 1), b // size("K"), -1), over="T"), b % size("K"), over="K")


@fusion(x=In("T K", dtype="int32"))
def counted(x):
    """A running count, row by row."""
    return cumsum(x > 0, over="T K")


@fusion(has=In("B", dtype="bool"), x=In("T K"), at=In("T", dtype="int32"), dynamic="T B")
def moved(has, x, at):
    """Rows at other places, -1 where there is none."""
    return where(has, place(x, B=at), -1.0)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(("tokens", "more"), [(0, 0), (0, 3), (1, 0), (7, 4), (70, 1)])
def test_an_axis_that_follows_from_others(implementation, tokens, more):
    """Its size is worked out at the call, from sizes and parameters, and a new one compiles nothing."""
    x = np.random.default_rng(tokens).standard_normal((tokens, 3)).astype(np.float32)
    got = run(implementation, Call(flat, {"x": x}, {"more": more})).outputs["out"]
    np.testing.assert_array_equal(got, np.concatenate([x.ravel(), np.zeros(more, np.float32)]))


def test_sizes_that_cannot_follow():
    """One sentence that names the axis."""

    @fusion(x=In("T"), dynamic="T B", axes={"B": lambda T: T - 3})
    def shorter(x):
        return gather(x, iota("B"), over="T")

    @fusion(x=In("T"), dynamic="T B", axes={"B": lambda Q: Q})
    def unknown(x):
        return gather(x, iota("B"), over="T")

    @fusion(x=In("T"), axes={"B": lambda T: T / 2})
    def half(x):
        return gather(x, iota("B"), over="T")

    @fusion(x=In("T B"), axes={"B": lambda T: 2 * T})
    def square(x):
        return x

    for tokens in (3, 4):
        with pytest.raises(
            ShapeError, match=f"half: axis B would have {tokens / 2} elements; sizes are 0 or more, and integers"
        ):
            half.bind({"x": (tokens,)}, {"x": "float32"}, {})
    assert dict(square.bind({"x": (2, 4)}, {"x": "float32"}, {}).sizes) == {"T": 2, "B": 4}
    with pytest.raises(ShapeError, match="square: axis B has 9 elements in the operands; it must have 4 as its rule says"):
        square.bind({"x": (2, 9)}, {"x": "float32"}, {})
    assert dict(shorter.bind({"x": (5,)}, {"x": "float32"}, {}).sizes) == {"T": 5, "B": 2}
    with pytest.raises(ShapeError, match="shorter: axis B would have -1 elements; sizes are 0 or more"):
        shorter.bind({"x": (2,)}, {"x": "float32"}, {})
    with pytest.raises(DeclarationError, match="unknown: the size of B follows from Q, no axis or parameter"):
        unknown.bind({"x": (2,)}, {"x": "float32"}, {})


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 300])
def test_running_sums_go_on_from_block_to_block(implementation, tokens):
    """Of integers, along two axes, the outer one run-time; of floats along one."""
    rng = np.random.default_rng(tokens)
    x = rng.integers(-3, 3, (tokens, 3)).astype(np.int32)
    got = run(implementation, Call(counted, {"x": x})).outputs["out"]
    np.testing.assert_array_equal(got, np.cumsum(x.ravel() > 0).reshape(x.shape))
    floats = rng.standard_normal((tokens, 5)).astype(np.float32)
    got = run(implementation, Call(running, {"x": floats})).outputs["out"]
    np.testing.assert_allclose(got, np.cumsum(floats.astype(np.float64), axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["loop:T:1 tile:H:1", "loop:T:8 tile:H:4", "loop:T:64 tile:H:8"])
def test_every_block_of_a_running_sum(schedule):
    x = np.random.default_rng(3).standard_normal((37, 5)).astype(np.float32)
    out, graph = np.full_like(x, np.nan), graph_of(running, {"x": x.shape})
    execute(planned(graph, schedule), {"x": x, "out": out}, {"T": 37})
    np.testing.assert_allclose(out, np.cumsum(x.astype(np.float64), axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        ("tile:T:8 tile:H:4", "axis T cannot be tile in blocks of 8: it is reduced, scanned or missing from an output"),
        ("loop:T:8 loop:H:4", "a running sum along T also varies over H, which cannot be looped over beside it"),
    ],
)
def test_where_a_running_sum_cannot_go(schedule, why):
    assert why in (legal(graph_of(running, {"x": (9, 5)}), Schedule.parse(schedule)) or "")


def rows_to_move(tokens, seed):
    """Operands of `moved`, and what comes of them: places for two rows of three, the others lie before or past the end."""
    rng = np.random.default_rng(seed)
    x, places = rng.standard_normal((tokens, 3)).astype(np.float32), 2 * tokens
    at = (rng.permutation(3 * tokens)[:tokens] - tokens // 2).astype(np.int32)
    inside = (at >= 0) & (at < places)
    expected = np.full((places, 3), -1, np.float32)
    expected[at[inside]] = x[inside]
    return {"has": np.isin(np.arange(places), at), "x": x, "at": at}, expected


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("tokens", [0, 1, 6, 50])
def test_values_are_placed(implementation, tokens):
    """At indices of the new axis; one outside of it places nothing."""
    values, expected = rows_to_move(tokens, tokens)
    got = run(implementation, Call(moved, values)).outputs["out"]
    np.testing.assert_array_equal(got, expected)


def test_what_is_not_placed_is_not_written():
    """In place of zeros, which would cost a launch: scratch is as it was."""
    values, expected = rows_to_move(9, 4)
    plan = planned(graph_of(moved, {n: v.shape for n, v in values.items()}, {"x": "float32"}))
    (scratch,) = plan.scratch
    memory = values | {scratch.name: poison(scratch.shape({"B": 18}), "float32")}
    launch(plan.programs[0], memory, {"T": 9, "B": 18})
    assert scratch.axes == ("B", "K")
    np.testing.assert_array_equal(np.isnan(memory[scratch.name]), expected == -1)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_rows_of_a_block_go_to_places_of_their_own(block):
    """A block of any size is stored at data, as no two places are the same."""
    values, expected = rows_to_move(23, 5)
    graph, out = graph_of(moved, {n: v.shape for n, v in values.items()}, {"x": "float32"}), np.full_like(expected, np.nan)
    schedule = f"tile:T:{block} tile:K:4 stage:placed then tile:B:8 tile:K:4"
    execute(planned(graph, schedule), values | {"out": out}, {"T": 23, "B": 46})
    np.testing.assert_array_equal(out, expected)


def test_a_launch_of_its_own_places():
    graph = graph_of(moved, {"has": (4,), "x": (2, 3), "at": (2,)}, {"x": "float32"})
    why = legal(graph, Schedule.parse("loop:T:1 tile:K:4 tile:B:1"))
    assert "a value is placed along B, which a launch of its own does; stage it" in (why or "")
    assert " stage:placed then " in str(heuristic(graph))
