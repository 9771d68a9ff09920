"""Making a failure small keeps the failure that was found: a refusal, or another error, is not taken for it."""

import pytest
import torch

from moekit.testing.case import FuzzCase
from moekit.testing.failures import fails, problems, shrink, sort_of
from moekit.testing.processes import Process

WRONG = FuzzCase("silu_and_mul", {"T": 6, "I": 16}, {"gate_up": "bfloat16"}, {}, recipe="normal", seed=4)


def refuses_float32(gate_up):
    """Wrong in its fourth row; and it takes numbers of 16 bits only."""
    if gate_up.dtype == torch.float32:
        raise RuntimeError("failed to dispatch data type Float")
    gate, up = gate_up.float().chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    out[3:4] += 1
    return out.to(gate_up.dtype)


@pytest.mark.parametrize(("said", "sort"), [
    (["silu_and_mul: out[0, 0] is 1.0, the reference says 2.0; 1 of 4 elements are out of bounds"], "silu_and_mul"),
    (["RuntimeError: failed to dispatch data type Float"], "RuntimeError"),
    (["its process died with exit code -11"], "process"),
    (["its process ended with an error of the device: AcceleratorError: CUDA error"], "process"),
    (["it did not end in 60 seconds"], "process"),
    ([], ""),
])  # fmt: skip
def test_failures_are_told_apart(said, sort):
    """By an error's type, by the process's end, or as wrong values of a fusion."""
    assert sort_of(said) == sort


def test_a_refusal_is_not_the_failure_that_was_found():
    """float32 would be simpler, and is refused: the case stays in bfloat16, with the row that is wrong."""
    process, name = Process(), f"{__name__}:refuses_float32"
    try:
        found = problems(process, WRONG, name)
        assert sort_of(found) == "silu_and_mul"
        small = shrink(WRONG, lambda case: fails(process, case, name, found))
        assert small.dtypes == {"gate_up": "bfloat16"}
        assert small.sizes == {"T": 4, "I": 1}
        assert sort_of(problems(process, small, name)) == "silu_and_mul"
        assert not fails(process, FuzzCase("silu_and_mul", {"T": 4, "I": 1}, {"gate_up": "float32"}), name, found)
    finally:
        process.end()
