"""A call that updates its operands and one that writes elsewhere add up alike, so their bits are the same."""

import pytest

from moekit.compile.passes.form import out_of_place, written_name
from moekit.compile.rules import heuristic
from tests.backends.samples import SAMPLES

UPDATING = [n for n, s in SAMPLES.items() if any(t.role == "InOut" for t in s.bound()[2].tensors.values())]


@pytest.mark.parametrize("name", UPDATING)
def test_both_forms_have_one_schedule(name):
    graph = SAMPLES[name].bound()[2]
    updated = frozenset(n for n, t in graph.tensors.items() if t.role == "InOut")
    apart = str(heuristic(out_of_place(graph, updated)))
    for tensor in updated:
        apart = apart.replace(written_name(tensor), tensor)
    assert apart == str(heuristic(graph))
