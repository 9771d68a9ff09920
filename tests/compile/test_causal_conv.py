"""A state that is read at other elements than are written, in place: how programs of causal_conv1d_step may hold it."""

import programs as good
import pytest

from moekit.compile import tile as t
from moekit.compile.passes.form import out_of_place
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.fusions.causal_conv1d_step import causal_conv1d_step as FUSION
from moekit.testing import Call, check, operands

SIZES = {"T": 5, "C": 37, "S": 3}
SHAPES = {"x": (5, 37), "state": (5, 37, 3), "weight": (37, 4)}


def graph():
    """Of the sizes above, in bfloat16."""
    return good.graph_of(FUSION, SHAPES, "bfloat16")


@pytest.mark.parametrize("how", ["tile:S:1", "loop:S:2"])
def test_one_program_holds_what_is_read_elsewhere(how):
    """Another block of S would be read by one program, or turn, and written by another."""
    kind, _, block = how.split(":")
    why = legal(graph(), Schedule.parse(f"tile:T:1 tile:C:16 {how} whole:S+1:4"))
    assert why is not None
    assert why.startswith(f"causal_conv1d_step: axis S cannot be {kind} in blocks of {block}: ")


def test_other_axes_are_held_in_any_way():
    """A loop over channels loads a block of them, and stores it, turn by turn."""
    for text in ("tile:T:2 tile:C:16 whole:S:4 whole:S+1:4", "tile:T:1 loop:C:16 whole:S:4 whole:S+1:4"):
        values = operands(FUSION, SIZES, "bfloat16")
        check("interpret", Call(FUSION, values, schedule=Schedule.parse(text)))


def test_a_barrier_stands_where_lanes_may_store_what_others_load():
    """In place, and nowhere else: what goes elsewhere needs none."""

    def barriers(graph) -> list:
        return [op for p in good.planned(graph).programs for s in p.sections for op in good.operations(s, t.Barrier)]

    assert barriers(graph()) == [t.Barrier()]
    assert barriers(out_of_place(graph(), frozenset({"state"}))) == []
