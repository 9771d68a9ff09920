"""delta_rule_step in every implementation."""

import numpy as np
import pytest

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands

FUSION = FUSIONS["delta_rule_step"]


class TestDeltaRuleStep(FusionSuite):
    """The suite, with key heads shared by one, two and three value heads."""

    fusion = FUSION
    sizes = (
        {"T": 3, "K": 2, "V": 4, "Dk": 8, "Dv": 9},
        {"T": 0, "K": 1, "V": 2, "Dk": 4, "Dv": 4},
        {"T": 1, "K": 1, "V": 1, "Dk": 1, "Dv": 1},
        {"T": 2, "K": 1, "V": 3, "Dk": 17, "Dv": 33},
        {"T": 2, "K": 3, "V": 3, "Dk": 32, "Dv": 16},
    )
    recipes = ("tiny",)


@pytest.mark.parametrize("implementation", implementations())
def test_decay_far_from_zero(implementation):
    """A gate far below zero keeps the state, one far above it forgets it."""
    values = operands(FUSION, {"T": 4, "K": 1, "V": 2, "Dk": 8, "Dv": 8})
    values["a"] = np.repeat([[-100], [-20], [20], [100]], 2, 1).astype(np.float32)
    check(implementation, Call(FUSION, values))


def test_heads_that_do_not_divide():
    """V is a multiple of K; the message gives both."""
    with pytest.raises(ShapeError, match="v has 3 heads and k has 2; V must be a multiple of K"):
        Call(FUSION, operands(FUSION, {"T": 1, "K": 2, "V": 3, "Dk": 4, "Dv": 4})).graph  # noqa: B018
