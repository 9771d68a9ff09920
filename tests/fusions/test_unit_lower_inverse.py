"""unit_lower_inverse in every implementation: times what it was made of, it is the identity."""

import numpy as np
import pytest

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["unit_lower_inverse"]


class TestUnitLowerInverse(FusionSuite):
    """The suite, with matrices that fill no block, and of one element."""

    fusion = FUSION
    sizes = ({"T": 3, "Lr": 5, "Lc": 5}, {"T": 0, "Lr": 4, "Lc": 4}, {"T": 1, "Lr": 1, "Lc": 1})


@pytest.mark.parametrize("implementation", implementations())
def test_what_stands_above_is_not_looked_at_and_alike_rows_lose_no_digits(implementation):
    """Of rows of ones the powers are 3,432 times as large as the inverse, which has ones beside its diagonal alone."""
    system = np.where(np.tril(np.ones((16, 16), bool), -1), np.float32(0.999), np.float32(np.nan))[None].repeat(2, axis=0)
    got = run(implementation, Call(FUSION, {"system": system})).outputs["out"].astype(np.float64)
    wanted = np.linalg.inv(np.eye(16) + np.tril(np.nan_to_num(system[0].astype(np.float64)), -1))
    np.testing.assert_allclose(got, np.stack([wanted, wanted]), rtol=0, atol=1e-6)


def test_refused():
    """In one sentence."""
    for wrong, why in (({"Lc": 4}, "5 rows and 4 columns; it must be square"), ({"Lr": 65, "Lc": 65}, "at most 64")):
        call = Call(FUSION, operands(FUSION, {"T": 1, "Lr": 5, "Lc": 5} | wrong, "float32"))
        with pytest.raises(ShapeError, match=why):
            FUSION.trace(call.binding)
