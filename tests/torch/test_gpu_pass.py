"""The pass under compute-sanitizer, its Triton half emulated: cases go through the doors they must, and are right."""

import pytest

from moekit.testing.executors import Torch
from moekit.testing.gpu_pass import cases, counted, doors_of
from moekit.testing.oracle import Oracle
from moekit.torch import fast, launch

CASES = [c for i, c in cases() if i == "triton" and c.sizes.get("T", 0) < 33]
SLOW = ("looped", "small", "dots", "split", "single parts")  # to interpret
FEW = [c for n, c in enumerate(CASES) if c.schedule not in SLOW and (n % 25 == 0 or (c.fusion == "probe_slots" and n % 5 == 0))]


@pytest.fixture
def triton(emulated, monkeypatch):
    """Triton's kernels emulated; what counts them is taken off again afterwards."""
    monkeypatch.setattr(launch, "_start", launch._start)
    monkeypatch.setattr(fast, "_launch", fast._launch)
    return Torch("triton", "triton", "cpu")


@pytest.mark.parametrize("case", FEW, ids=[f"{n} {c.fusion} {c.mode} {c.schedule}" for n, c in enumerate(FEW)])
def test_a_case_of_the_pass(case, triton):
    outcome, launched = counted(triton, case)
    assert {door for door, count in launched.items() if count} == set(doors_of("triton", case))
    assert not Oracle.of(case, "triton").compare(outcome.outputs).problems
