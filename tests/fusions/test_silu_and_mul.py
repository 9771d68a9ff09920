"""silu_and_mul in every implementation."""

import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations


class TestSiluAndMul(FusionSuite):
    """The suite, with the sizes where blocks end."""

    fusion = FUSIONS["silu_and_mul"]
    sizes = (
        {"T": 7, "I": 37},
        {"T": 0, "I": 8},
        {"T": 1, "I": 1},
        {"T": 3, "I": 512},
        {"T": 2, "I": 1025},
        {"T": 65, "I": 127},
    )


@pytest.mark.parametrize("implementation", implementations())
def test_gates_far_from_zero(implementation):
    """silu is 0 far below zero and the identity far above it, with no overflow on the way."""
    gate = np.array([[-1e4, -200, -89, -88, -1, 0, 1, 88, 200, 1e4]], np.float32)
    up = np.full_like(gate, 3)
    check(implementation, Call(FUSIONS["silu_and_mul"], {"gate_up": np.concatenate([gate, up], -1)}))
