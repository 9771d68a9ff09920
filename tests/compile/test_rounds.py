"""Programs that take blocks of an axis in turn: in every implementation of programs what one for each block gives."""

import pytest

from moekit.fusions import FUSIONS
from moekit.testing import check, implementations
from moekit.testing.case import FuzzCase
from moekit.testing.schedules import variants

SIZES = {
    "gate_projections": {"T": 5, "D": 37, "I": 23, "E": 18, "G": 1},
    "silu_and_mul": {"T": 3, "I": 45},
    "expert_down": {"T": 3, "K": 2, "E": 4, "I": 9, "H": 21},
    "delta_rule_step": {"T": 2, "K": 1, "V": 2, "Dk": 5, "Dv": 13},
}
HERE = [i for i in implementations() if i.values[0] in ("interpret", "pallas", "triton")]


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("name", SIZES)
def test_blocks_in_turn(name, implementation):
    """Two programs for eleven blocks and more, the last of which is not full."""
    fusion = FUSIONS[name]
    dtypes = {n: "float32" if "float32" in spec.dtypes else spec.dtypes[0] for n, spec in fusion.tensors.items()}
    case = FuzzCase(name, SIZES[name], dtypes, seed=3, schedule="rounds")
    assert "rounds" in str(variants(case.graph)["rounds"])
    check(implementation, case)
