"""gate_projections in every implementation: three outputs of one GEMM, from one packed weight or three."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.rules import spread
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, compare, implementations, operands, run

FUSION = FUSIONS["gate_projections"]
SIZES = {"T": 5, "I": 12, "E": 21, "G": 1, "D": 72}
USED = 2 * 12 + 21 + 1  # rows of a packed weight; the rest is padding
PARTS = ("gate_up", "router", "shared_gate")


def sigmoid(x):
    """Without overflow on either side."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def expected(values):
    """The outputs in float64, one product per weight row."""
    x, gate_up, router, shared_gate = (np.asarray(values[n], np.float64) for n in ("x", *PARTS))
    inner = gate_up.shape[0] // 2
    product = lambda w: np.stack([(x * row).sum(-1) for row in w], -1)  # noqa: E731
    gate, up = product(gate_up[:inner]), product(gate_up[inner:])
    return {"activated": gate * sigmoid(gate) * up, "logits": product(router), "share": sigmoid(product(shared_gate))}


class TestGateProjections(FusionSuite):
    """The suite, with widths that fill no block, one of each, and a shared gate of several columns."""

    fusion = FUSION
    sizes = (
        {"T": 5, "I": 9, "E": 21, "G": 1, "D": 70},
        {"T": 0, "I": 4, "E": 8, "G": 1, "D": 16},
        {"T": 1, "I": 1, "E": 1, "G": 1, "D": 1},
        {"T": 17, "I": 33, "E": 5, "G": 2, "D": 127},
        {"T": 2, "I": 16, "E": 32, "G": 1, "D": 257},
    )


@pytest.mark.parametrize("implementation", implementations())
def test_against_float64(implementation):
    """The suite's own reference is not the only word on what the outputs are."""
    values = operands(FUSION, SIZES, "float32", seed=3)
    got = run(implementation, Call(FUSION, values)).outputs
    for name, wanted in expected(values).items():
        np.testing.assert_allclose(got[name], wanted, rtol=2e-5, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("implementation", implementations())
def test_small_integers_are_exact(implementation):
    """Products are added up in float32 and rounded once; every order gives the same sums of small integers."""
    values = operands(FUSION, SIZES | {"D": 300}, "bfloat16", "integers")
    got = run(implementation, Call(FUSION, values)).outputs
    np.testing.assert_array_equal(got["logits"], expected(values)["logits"].astype(ml_dtypes.bfloat16))
    assert got["share"].dtype == np.float32


@pytest.mark.parametrize("implementation", implementations())
def test_float32_is_not_rounded_to_tf32(implementation):
    """Operands with more than ten bits of mantissa keep them all."""
    assert check(implementation, Call(FUSION, operands(FUSION, SIZES, "float32", seed=5))).worst < 1


@pytest.mark.parametrize("implementation", ["interpret", "pallas", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", ["split:D:2", "split:D:3", "split:D:8", "parts:D:3", "parts:D:4"])
@pytest.mark.parametrize("depth", [31, 32, 250])
def test_contraction_in_parts(implementation, how, depth):
    """Parts of any number, some of them empty, in a second launch or in a row, add up to the whole."""
    values = operands(FUSION, SIZES | {"D": depth}, "float32")
    call = Call(FUSION, values)
    wish = f"tile:T:16 loop:D:16 tile:E:16 tile:G:16 tile:I:16 {how} warps:4 stages:2"
    check(implementation, replace(call, schedule=spread(call.graph, wish)))


@pytest.mark.parametrize("implementation", implementations())
def test_far_from_zero(implementation):
    """silu and sigmoid saturate without overflow on the way."""
    values = operands(FUSION, SIZES, "float32")
    values["x"] = values["x"] * np.float32(1e3)
    check(implementation, Call(FUSION, values))


@pytest.mark.parametrize("implementation", implementations())
def test_rows_of_nan_stay_alone(implementation):
    """A row of NaN gives NaN, and every other row what it gives without it, bit for bit."""
    values = operands(FUSION, SIZES, "bfloat16")
    clean = run(implementation, Call(FUSION, values)).outputs
    values["x"] = values["x"].copy()
    values["x"][[1, 3]] = np.nan
    for name, got in run(implementation, Call(FUSION, values)).outputs.items():
        assert np.isnan(got[[1, 3]].astype(np.float32)).all(), name
        np.testing.assert_array_equal(got[[0, 2, 4]], clean[name][[0, 2, 4]], err_msg=name)


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.gpu), "eager"])
def test_parts_of_a_packed_gate_in_torch(implementation, dtype, padding):
    """Views of one packed weight give what separate weights give, whatever its padding rows hold."""
    import torch

    import moekit.torch as mt

    device = "cuda" if implementation == "triton" else "cpu"
    values = operands(FUSION, SIZES, "float32", seed=9).values()
    x, *weights = (torch.from_numpy(v).to(device, getattr(torch, dtype)) for v in values)
    packed = mt.pack_gate(*weights)
    assert len(packed.weight) == USED + 2
    packed.weight[USED:] = padding
    assert all(p.untyped_storage().data_ptr() == packed.weight.untyped_storage().data_ptr() for p in packed.parts)
    for got, wanted in zip(
        mt.gate_projections(x, *packed.parts, implementation=implementation),
        mt.gate_projections(x, *weights, implementation=implementation),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert got.isfinite().all()


@pytest.mark.parametrize("padding", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_parts_of_a_packed_gate_in_jax(implementation, padding):
    """The same with Views, under jit; XLA may choose another of its GEMMs for a slice, and is held to the reference."""
    import jax
    import jax.numpy as jnp

    import moekit.jax as mj

    values = operands(FUSION, SIZES, "bfloat16", seed=9)
    x, *weights = map(jnp.asarray, values.values())
    packed = mj.pack_gate(*weights)
    poisoned = type(packed)(packed.weight.at[USED:].set(padding), packed.widths)
    call = lambda x, *parts: mj.gate_projections(x, *parts, implementation=implementation)  # noqa: E731
    got = jax.jit(lambda x, gate: call(x, *gate.parts))(x, poisoned)
    compare(FUSION, dict(zip(("activated", "logits", "share"), map(np.asarray, got), strict=True)), values).check()
    for a, b in zip(got, jax.jit(call)(x, *weights), strict=True):
        assert implementation == "xla" or np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert np.isfinite(np.asarray(a, np.float32)).all()
