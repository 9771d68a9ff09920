"""What one element of an axis hands on to the next: in every implementation, and where it cannot be said."""

import numpy as np
import pytest
from programs import graph_of, planned

from moekit.compile.rules import heuristic
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.compile.tile import Loop, walk
from moekit.compile.tile.interpret import run as execute
from moekit.errors import DeclarationError
from moekit.lang import In, InOut, cumsum, f32, fusion, in_turns, size, sum
from moekit.testing import Call, implementations, run


@fusion(kept=In("T M"), x=In("T M H"), begin=InOut("T H"))
def remembered(kept, x, begin):
    """A sum that fades, and what it was at each element before that was added."""
    seen, begin = in_turns(lambda held: (held + size("M"), f32(kept) * held + f32(x)), f32(begin), over="M")
    return {"seen": seen, "begin": begin}


@fusion(x=In("T M H"), begin=In("T H"))
def last(x, begin):
    """No output varies along the axis."""
    return in_turns(lambda held: (None, f32(x) - 0.5 * held), f32(begin), over="M")[1]


@fusion(x=In("T M H"), begin=In("T H"))
def totals(x, begin):
    """What comes of each element is added up afterwards, along it and beside it."""
    seen, left = in_turns(lambda held: (held * held, f32(x) - held), f32(begin), over="M")
    return sum(seen, over="H") + sum(left, over="H")


def recurrence(kept, x, begin):
    """float64, element by element."""
    seen, held = np.zeros(x.shape), begin.astype(np.float64)
    for m in range(x.shape[1]):
        seen[:, m] = held + x.shape[1]
        held = kept[:, m, None].astype(np.float64) * held + x[:, m]
    return seen, held


def operands(tokens, turns, width=5):
    rng = np.random.default_rng(turns)
    shapes = {"kept": (tokens, turns), "x": (tokens, turns, width), "begin": (tokens, width)}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(("tokens", "turns"), [(0, 3), (3, 1), (3, 2), (7, 19)])
def test_each_element_begins_with_what_the_one_before_left(implementation, tokens, turns):
    given = operands(tokens, turns)
    got = run(implementation, Call(remembered, {n: a.copy() for n, a in given.items()})).outputs
    seen, left = recurrence(**given)
    np.testing.assert_allclose(got["seen"], seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["begin"], left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_what_the_last_one_leaves_alone(implementation):
    given = operands(3, 6)
    held = given["begin"].astype(np.float64)
    for m in range(6):
        held = given["x"][:, m] - 0.5 * held
    got = run(implementation, Call(last, {n: given[n] for n in ("x", "begin")})).outputs["out"]
    np.testing.assert_allclose(got, held, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_what_comes_of_elements_goes_on(implementation):
    """Both results are used by what is computed next."""
    given = operands(3, 6)
    held, seen = given["begin"].astype(np.float64), []
    for m in range(6):
        seen.append((held * held).sum(-1))
        held = given["x"][:, m] - held
    got = run(implementation, Call(totals, {n: given[n] for n in ("x", "begin")})).outputs["out"]
    np.testing.assert_allclose(got, np.stack(seen, 1) + held.sum(-1)[:, None], rtol=1e-4, atol=1e-4)


def test_it_is_one_loop():
    """Outputs along the axis are stored in the loop that hands on, whose last value is the other output."""
    graph = graph_of(remembered, {n: a.shape for n, a in operands(7, 19).items()})
    schedule = "tile:T:4 loop:M:1 tile:H:4 warps:4 stages:1"
    (program,) = planned(graph, schedule).programs
    assert [type(op) for op, _ in walk(program.body)].count(Loop) == 1
    given = operands(7, 19)
    memory = given | {"seen": np.full((7, 19, 5), np.nan, np.float32)}
    seen, left = recurrence(**{n: a.copy() for n, a in given.items()})
    execute(planned(graph, schedule), memory, {"T": 7})
    np.testing.assert_allclose(memory["seen"], seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(memory["begin"], left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "schedule", "why"),
    [
        (remembered, "tile:T:4 whole:M:32 tile:H:4", "values are handed on along it, so it must be loop:M:1"),
        (remembered, "tile:T:4 loop:M:4 tile:H:4", "values are handed on along it, so it must be loop:M:1"),
        (remembered, "tile:T:4 loop:M:1 loop:H:4", "what is handed on along M also varies over H, which cannot be looped over"),
    ],
)
def test_where_a_schedule_cannot_hand_on(fusion, schedule, why):
    shapes = {n: a.shape for n, a in operands(7, 19).items() if n in fusion.tensors}
    assert why in (legal(graph_of(fusion, shapes), Schedule.parse(schedule)) or "")


def test_rules_hand_on():
    """What the rules choose is legal."""
    graph = graph_of(remembered, {n: a.shape for n, a in operands(7, 19).items()})
    assert "loop:M:1" in str(heuristic(graph))
    assert legal(graph, heuristic(graph)) is None


@pytest.mark.parametrize(
    ("step", "begin", "why"),
    [
        (lambda held, x: (None, held), lambda x: f32(x), "begins with a value that varies over 'M'"),
        (lambda held, x: (None, f32(x)), lambda x: sum(x, over="M H"), r"and hands on one that varies over \('T', 'H'\)"),
        (lambda held, x: (None, 1.0), lambda x: sum(x, over="M"), "takes a traced value, got 1.0"),
        (
            lambda held, x: (None, held + f32(x)),
            lambda x: in_turns(lambda held: (None, held + f32(x)), sum(x, over="M"), over="M")[1],
            "in_turns over 'M' begins with what other turns over 'M' left",
        ),
    ],
)
def test_what_a_declaration_cannot_say(step, begin, why):
    @fusion(x=In("T M H"))
    def wrong(x):
        return in_turns(lambda held: step(held, x), begin(x), over="M")[1]

    with pytest.raises(DeclarationError, match=why):
        graph_of(wrong, {"x": (3, 4, 5)})


def test_a_dynamic_axis_hands_nothing_on():
    @fusion(x=In("M H"), dynamic="M")
    def wrong(x):
        return in_turns(lambda held: (None, held + f32(x)), sum(x, over="M"), over="M")[1]

    with pytest.raises(DeclarationError, match="in_turns over the dynamic axis 'M'; its size must be static"):
        graph_of(wrong, {"x": (3, 4)})


def test_nothing_is_added_up_along_turns_on_the_way():
    @fusion(x=In("T M H"), y=In("T M H"))
    def wrong(x, y):
        def step(held):
            return cumsum(held + f32(x), over="M"), held + f32(x)

        return in_turns(step, sum(y, over="M"), over="M")[0]

    with pytest.raises(DeclarationError, match="in_turns over 'M' has a cumsum along 'M' of what it hands on"):
        graph_of(wrong, {"x": (3, 4, 5), "y": (3, 4, 5)})
