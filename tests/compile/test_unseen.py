"""Declarations that nobody has seen run through every implementation, dtype, layout and schedule."""

import math

import numpy as np
import pytest
import unseen

from moekit.lang.dtypes import FLOATS
from moekit.lang.fusion import Fusion
from moekit.testing import Call, check, implementations, operands, run, variants

FUSIONS = list(unseen.SIZES)
SCHEDULES = ("looped", "dots", "rows", "small", "whole", "split")


def values_of(fusion: Fusion, dtype: str, layout_seed: int = 0) -> dict[str, np.ndarray]:
    """Operands; slots are unique, one of them out of range."""
    values = operands(fusion, unseen.SIZES[fusion], dtype, seed=layout_seed)
    if "slots" in values:
        values["slots"] = np.array([7, 0, -1, 10, 3], values["slots"].dtype)
    return values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("implementation", implementations())
def test_every_implementation(implementation, fusion, dtype):
    """Within the bound of the reference."""
    if implementation in ("xla", "pallas") and dtype != FLOATS[FUSIONS.index(fusion) % 3]:
        dtype = "float32"
    check(implementation, Call(fusion, values_of(fusion, dtype)))


SCHEDULED = [
    pytest.param(fusion, schedule, id=f"{fusion.name}-{schedule}")
    for fusion in FUSIONS
    for schedule in SCHEDULES
    if schedule != "small" or math.prod(unseen.SIZES[fusion].values()) < 3000  # a program for every element
]


@pytest.mark.parametrize(("fusion", "schedule"), SCHEDULED)
def test_every_schedule(fusion, schedule):
    """Within the bound however the work is cut up; where a schedule is not legal the heuristic's stands in."""
    bare = Call(fusion, values_of(fusion, "bfloat16"))
    check("interpret", Call(fusion, bare.operands, schedule=variants(bare.graph).get(schedule)))


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f.name)
def test_enough_schedules_are_legal(fusion):
    """Each declaration is tested under three schedules at least."""
    assert len(variants(Call(fusion, values_of(fusion, "float32")).graph)) >= 3


@pytest.mark.parametrize("layout", ["transposed padded", "strided", "row 0", "shifted"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("implementation", ["interpret", "eager in place"])
def test_every_layout(implementation, fusion, layout):
    """Strides and offsets of every kind, with guards around each tensor."""
    values = values_of(fusion, "float32")
    layouts = {n: layout for n in [*values, *Call(fusion, values).names] if (n, layout) != ("slots", "row 0")}
    check(implementation, Call(fusion, values, layouts=layouts))


@pytest.mark.parametrize("implementation", implementations())
def test_sines_of_large_angles(implementation):
    """A rotary embedding at position 131072 turns by as much; float32 ends at 3e38. Each is exact to a few ulps."""
    values = values_of(unseen.waves, "float32")
    rng = np.random.default_rng(5)
    values["x"][:] = rng.uniform(-1, 1, values["x"].shape) * np.float32([[1e3], [131072], [1e7], [1e20], [3e38]])
    got = run(implementation, Call(unseen.waves, values)).outputs["sine"]
    np.testing.assert_allclose(got, np.sin(values["x"].astype(np.float64)), rtol=4e-7, atol=0)
    check(implementation, Call(unseen.waves, values))


@pytest.mark.parametrize(
    "fusion", [f for f in FUSIONS if "T" in unseen.SIZES[f] and f is not unseen.column_extremes], ids=lambda f: f.name
)
@pytest.mark.parametrize("implementation", ["interpret", "numpy", "eager", "xla", "pallas"])
def test_no_tokens(implementation, fusion):
    """Zero tokens give empty outputs, and zeros where tokens are summed."""
    check(implementation, Call(fusion, operands(fusion, unseen.SIZES[fusion] | {"T": 0})))
