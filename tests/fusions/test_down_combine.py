"""down_combine in every implementation: a product added to what is there, in place."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.rules import spread
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands, run

FUSION = FUSIONS["down_combine"]
SIZES = {"T": 5, "H": 50, "I": 40, "H?": 1}


def expected(values):
    """hidden + share · Σ activated·down in float64."""
    hidden, activated, down, share = (np.asarray(v, np.float64) for v in values.values())
    return hidden + share * np.stack([(activated * row).sum(-1) for row in down], -1)


class TestDownCombine(FusionSuite):
    """The suite, with a share of width 1 and one of width H."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 5, "H": 50, "I": 40},
        {"T": 0, "H": 8, "I": 16},
        {"T": 1, "H": 1, "I": 1},
        {"T": 17, "H": 33, "I": 127, "H?": 1},
        {"T": 3, "H": 64, "I": 7},
    )


@pytest.mark.parametrize("share", [1, 50])
@pytest.mark.parametrize("implementation", implementations())
def test_against_float64(implementation, share):
    """The suite's own reference is not the only word on what the output is."""
    values = operands(FUSION, SIZES | {"H?": share}, "float32", seed=3)
    got = run(implementation, Call(FUSION, values)).outputs["hidden"]
    np.testing.assert_allclose(got, expected(values), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_rounded_once(implementation):
    """Sums of small integers and halves are exact in float32: what is left is the one rounding to hidden's dtype."""
    values = operands(FUSION, SIZES | {"I": 300}, "bfloat16", "integers")
    values["share"] = np.array([[0.5], [1], [0.25], [0], [0.5]], ml_dtypes.bfloat16)
    values["hidden"] = (values["hidden"].astype(np.float32) * 37).astype(ml_dtypes.bfloat16)
    got = run(implementation, Call(FUSION, values)).outputs["hidden"]
    np.testing.assert_array_equal(got, expected(values).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("implementation", implementations())
def test_share_in_float32(implementation):
    """`gate_projections` gives the share in float32, whatever the dtype of the rest."""
    values = operands(FUSION, SIZES, "bfloat16") | {"share": operands(FUSION, SIZES, "float32", seed=1)["share"]}
    check(implementation, Call(FUSION, values))


@pytest.mark.parametrize("implementation", implementations())
def test_as_two_fusions(implementation):
    """The same as the product, and then shared_expert_combine with the gate the share came from."""
    values = operands(FUSION, SIZES, "float32", seed=7)
    gate = values["share"]
    values["share"] = (1 / (1 + np.exp(-gate.astype(np.float64)))).astype(np.float32)
    shared = values["activated"] @ values["down"].T
    combined = {"hidden": values["hidden"], "shared": shared, "gate": gate}
    two = run(implementation, Call(FUSIONS["shared_expert_combine"], combined)).outputs
    one = run(implementation, Call(FUSION, values)).outputs["hidden"]
    np.testing.assert_allclose(one, next(iter(two.values())), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_rows_of_nan_stay_alone(implementation):
    """A row of NaN in any of the operands gives NaN there; other rows are what they are without it, bit for bit."""
    values = operands(FUSION, SIZES, "bfloat16")
    clean = run(implementation, Call(FUSION, values)).outputs["hidden"]
    values = {n: v.copy() for n, v in values.items()}
    for row, name in enumerate(("hidden", "activated", "share")):
        values[name][row] = np.nan
    got = run(implementation, Call(FUSION, values)).outputs["hidden"]
    assert np.isnan(got[:3].astype(np.float32)).all()
    np.testing.assert_array_equal(got[3:], clean[3:])


@pytest.mark.parametrize("how", ["split:I:2", "split:I:3", "split:I:8", "parts:I:3"])
@pytest.mark.parametrize("depth", [31, 32, 200])
def test_contraction_in_parts(how, depth):
    """Parts of any number, some of them empty, in a second launch or in a row."""
    values = operands(FUSION, SIZES | {"I": depth}, "float32")
    call = Call(FUSION, values)
    check("interpret", replace(call, schedule=spread(call.graph, f"tile:T:16 tile:H:16 loop:I:16 {how} warps:4 stages:2")))


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.gpu), "eager"])
def test_in_place_in_torch(implementation):
    """hidden is updated where it is, here every second column of a wider buffer; its other columns stay."""
    import torch

    import moekit.torch as mt

    device = "cuda" if implementation == "triton" else "cpu"
    hidden, *others = (torch.from_numpy(v).to(device) for v in operands(FUSION, SIZES, seed=9).values())
    wide = torch.full((5, 100), float("nan"), device=device)
    wide[:, ::2] = hidden
    wanted = mt.down_combine(hidden, *others, implementation=implementation)
    got = mt.down_combine_(wide[:, ::2], *others, implementation=implementation)
    assert got.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[:, ::2], wanted, rtol=1e-5, atol=1e-5)
    assert wide[:, 1::2].isnan().all()


def test_share_of_another_width():
    """A share is [T, 1] or [T, H] and nothing between."""
    values = operands(FUSION, SIZES) | {"share": np.zeros((5, 4), np.float32)}
    with pytest.raises(ShapeError, match=r"share has shape \[5, 4\]; it must be \[T = 5, H = 50\]"):
        Call(FUSION, values).graph  # noqa: B018
