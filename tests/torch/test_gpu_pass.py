"""The pass under compute-sanitizer, its Triton half emulated: cases go through the doors they must, and are right."""

import pytest

from moekit.testing.gpu_pass import Doors, cases, doors_of, run_triton
from moekit.testing.oracle import Oracle
from moekit.torch import fast, launch

CASES = [c for i, c in cases() if i == "triton" and c.sizes.get("T", 0) < 33]
SLOW = ("looped", "small", "dots", "split")  # to interpret
FEW = [c for n, c in enumerate(CASES) if c.schedule not in SLOW and (n % 25 == 0 or (c.fusion == "probe_slots" and n % 5 == 0))]


@pytest.fixture
def doors(emulated, monkeypatch):
    """Counters, taken off again afterwards."""
    monkeypatch.setattr(launch, "_start", launch._start)
    monkeypatch.setattr(fast, "_launch", fast._launch)
    return Doors()


@pytest.mark.parametrize("case", FEW, ids=[f"{n} {c.fusion} {c.mode} {c.schedule}" for n, c in enumerate(FEW)])
def test_a_case_of_the_pass(case, doors):
    outputs, launched = run_triton(case, doors, "cpu")
    assert set(launched) == set(doors_of("triton", case))
    assert not Oracle.of(case, "triton").problems(outputs)[0]
