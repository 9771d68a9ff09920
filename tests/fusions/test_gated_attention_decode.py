"""gated_attention_decode in every implementation: what attention_decode gives, rounded, behind a gate."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["gated_attention_decode"]
SIZES = {"T": 5, "K": 2, "G": 3, "Q": 6, "L": 40, "D": 24, "Dv": 17}


class TestGatedAttentionDecode(FusionSuite):
    """The suite, whose lengths are 0 to 3; caches of several parts, and heads that share keys or do not."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "K": 1, "G": 2, "Q": 2, "L": 8, "D": 4, "Dv": 4},
        {"T": 1, "K": 1, "G": 1, "Q": 1, "L": 1, "D": 1, "Dv": 1},
        {"T": 2, "K": 1, "G": 8, "Q": 8, "L": 300, "D": 16, "Dv": 16},
    )
    params = ({"scale": 0.25}, {})


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gate_for_each_head(implementation, dtype):
    """One gate shut, the others open: no head but its own is nothing, and those are the bits of attention_decode."""
    values = operands(FUSION, SIZES | {"L": 300}, dtype, seed=2) | {"lengths": np.array([1, 300, 256, 0, 17], np.int32)}
    values["gate"] = np.full_like(values["gate"], 100)
    values["gate"][:, 4] = -np.inf
    got = run(implementation, Call(FUSION, values, {"scale": 0.2})).outputs["out"]
    plain = {n: x for n, x in values.items() if n != "gate"}
    wanted = run(implementation, Call(FUSIONS["attention_decode"], plain, {"scale": 0.2})).outputs["out"]
    wanted = np.where((np.arange(6).reshape(2, 3) == 4)[None, ..., None], 0, wanted.astype(np.float32))
    np.testing.assert_array_equal(got.astype(np.float32), wanted)
    assert np.any(got)


def test_the_gate_is_in_the_launch_that_puts_parts_together():
    """At the 80B's width over two GPUs: no launch beside those of attention_decode."""
    sizes = {"T": 1, "K": 1, "G": 8, "L": 1024, "D": 256, "Dv": 256}
    gated, plain = (FUSIONS[n].trace(example(FUSIONS[n], s, "bfloat16"))
                    for n, s in (("gated_attention_decode", sizes | {"Q": 8}), ("attention_decode", sizes)))  # fmt: skip
    assert heuristic(gated) == heuristic(plain)


def test_as_many_gates_as_queries():
    """One sentence, before anything is compiled."""
    with pytest.raises(ShapeError, match="axis Q has 5 elements in the operands; it must have 6 as its rule says"):
        Call(FUSION, operands(FUSION, SIZES | {"Q": 5}, "float32")).graph  # noqa: B018
