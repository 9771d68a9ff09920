"""shared_expert_combine in every implementation."""

import numpy as np
import pytest

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands

FUSION = FUSIONS["shared_expert_combine"]


class TestSharedExpertCombine(FusionSuite):
    """The suite, with a gate of width 1 and one of width H."""

    fusion = FUSION
    sizes = (
        {"T": 5, "H": 50, "H?": 1},
        {"T": 5, "H": 50},
        {"T": 0, "H": 16},
        {"T": 1, "H": 1},
        {"T": 2, "H": 1025, "H?": 1},
        {"T": 65, "H": 31},
    )


@pytest.mark.parametrize("implementation", implementations())
def test_saturated_gates(implementation):
    """Gates far from zero take all of the shared expert or nothing of it."""
    values = operands(FUSION, {"T": 6, "H": 20, "H?": 1}, "float32")
    values["gate"] = np.array([[-1e4], [-90], [-20], [20], [90], [1e4]], np.float32)
    check(implementation, Call(FUSION, values))


def test_gate_of_another_width():
    """A gate is [T, 1] or [T, H] and nothing between."""
    values = operands(FUSION, {"T": 2, "H": 8, "H?": 1})
    values["gate"] = np.zeros((2, 4), np.float32)
    with pytest.raises(ShapeError, match=r"gate has shape \[2, 4\]; it must be \[T = 2, H = 8\]"):
        Call(FUSION, values).graph  # noqa: B018
