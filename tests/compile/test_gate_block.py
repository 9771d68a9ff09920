"""gate_block in every implementation: from the residual stream to the gates, residual updated in place."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.rules import spread
from moekit.testing import Call, FusionSuite, check, implementations, operands, run
from tests.declarations import gate_block as FUSION

SIZES = {"T": 5, "I": 12, "E": 21, "G": 1, "D": 72}
USED = 2 * 12 + 21 + 1  # rows of a packed weight; the rest is padding


def sigmoid(x):
    """Without overflow on either side."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def expected(values, eps=1e-6, offset=1.0):
    """The outputs for float32 operands, in float64 and in the textbook's order: the norm first, then the products of it."""
    x, residual, weight, gate_up, router, shared_gate = (np.asarray(v, np.float64) for v in values.values())
    total = x + residual
    hidden = total / np.sqrt((total**2).mean(-1, keepdims=True) + eps) * (offset + weight)
    inner = gate_up.shape[0] // 2
    gate, up = hidden @ gate_up[:inner].T, hidden @ gate_up[inner:].T
    return {
        "hidden": hidden,
        "residual": total,
        "activated": gate * sigmoid(gate) * up,
        "logits": hidden @ router.T,
        "share": sigmoid(hidden @ shared_gate.T),
    }


class TestGateBlock(FusionSuite):
    """The suite, with widths that fill no block and one of each; zero-centred and plain."""

    fusion = FUSION
    sizes = (
        {"T": 5, "I": 9, "E": 21, "G": 1, "D": 70},
        {"T": 0, "I": 4, "E": 8, "G": 1, "D": 16},
        {"T": 1, "I": 1, "E": 3, "G": 1, "D": 1},
        {"T": 17, "I": 33, "E": 5, "G": 2, "D": 127},
    )
    params = ({}, {"offset": 0.0, "eps": 1e-5})


@pytest.mark.parametrize("implementation", implementations())
def test_against_float64(implementation):
    """The suite's own reference is not the only word: scaling rows after the products is the norm before them."""
    values = operands(FUSION, SIZES, "float32", seed=3)
    got = run(implementation, Call(FUSION, values)).outputs
    for name, wanted in expected(values).items():
        np.testing.assert_allclose(got[name], wanted, rtol=5e-5, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", implementations())
def test_narrow_dtypes_stay_near_float64(implementation, dtype):
    """Within the roundings of the operand and of the outputs; the residual is the float32 sum, rounded."""
    values = operands(FUSION, SIZES, dtype, seed=4)
    got = run(implementation, Call(FUSION, values)).outputs
    wide = {n: v.astype(np.float32) for n, v in values.items()}
    total = wide["x"] + wide["residual"]
    np.testing.assert_array_equal(got["residual"], total.astype(got["residual"].dtype))
    wanted = expected(wide)
    unit = float(ml_dtypes.finfo(got["hidden"].dtype).eps)
    for name in ("hidden", "activated", "logits", "share"):
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got[name].astype(np.float64) / scale, wanted[name] / scale, atol=2 * unit, err_msg=name)


@pytest.mark.parametrize("implementation", implementations())
def test_equal_experts_have_equal_logits(implementation):
    """Experts with equal weights tie whatever column they stand in: nothing but their rows decides their logits."""
    values = operands(FUSION, SIZES, "bfloat16", "integers", seed=2)
    values["weight"] = np.zeros_like(values["weight"])
    values["router"] = values["router"].copy()
    values["router"][11:21] = values["router"][10:0:-1]
    logits = run(implementation, Call(FUSION, values)).outputs["logits"]
    np.testing.assert_array_equal(logits[:, 11:21], logits[:, 10:0:-1])
    total = (values["x"].astype(np.float64) + values["residual"].astype(np.float64)).astype(ml_dtypes.bfloat16)
    scale = 1 / np.sqrt((total.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    products = total.astype(np.float64) @ values["router"].astype(np.float64).T
    np.testing.assert_allclose(logits.astype(np.float64), products * scale, rtol=2**-8)


@pytest.mark.parametrize("implementation", implementations())
def test_rows_of_nan_stay_alone(implementation):
    """A row of NaN gives NaN; every other row is what it is without it, bit for bit."""
    values = operands(FUSION, SIZES, "bfloat16")
    clean = run(implementation, Call(FUSION, values)).outputs
    values["x"] = values["x"].copy()
    values["x"][[1, 3]] = np.nan
    for name, got in run(implementation, Call(FUSION, values)).outputs.items():
        np.testing.assert_array_equal(got[[0, 2, 4]], clean[name][[0, 2, 4]], err_msg=name)
        assert np.isnan(got[[1, 3]].astype(np.float32)).all(), name


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("depth", [31, 32, 200])
def test_contraction_in_parts(parts, depth):
    """Any number of parts, some of them empty."""
    values = operands(FUSION, SIZES | {"D": depth}, "float32")
    call = Call(FUSION, values)
    wish = f"tile:T:16 loop:D:16 tile:E:16 tile:G:16 tile:I:16 split:D:{parts} warps:4 stages:2"
    check("interpret", replace(call, schedule=spread(call.graph, wish)))


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.gpu), "eager"])
def test_in_place_with_a_packed_gate_in_torch(implementation):
    """residual is updated where it is, x stays; views of a packed weight do, whatever its padding rows hold."""
    import torch

    import moekit.torch as mt

    device = "cuda" if implementation == "triton" else "cpu"
    x, residual, weight, *weights = (torch.from_numpy(v).to(device) for v in operands(FUSION, SIZES, seed=9).values())
    packed = mt.pack_gate(*weights)
    packed.weight[USED:] = float("nan")
    kept, before = x.clone(), residual.clone()
    wanted = mt.op(FUSION)(x, residual, weight, *weights, implementation=implementation)
    assert torch.equal(residual, before)
    got = mt.op(FUSION, in_place=True)(x, residual, weight, *packed.parts, implementation=implementation)
    assert got[1] is residual
    assert torch.equal(residual, before + x)
    assert torch.equal(x, kept)
    exact = {} if implementation == "triton" else {"rtol": 0, "atol": 0}  # another alignment may add up in another order
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_packed_gate_in_jax(implementation):
    """The same with Views, under jit, the residual donated."""
    import jax
    import jax.numpy as jnp

    import moekit.jax as mj

    values = [jnp.asarray(v) for v in operands(FUSION, SIZES, "bfloat16", seed=9).values()]
    packed = mj.pack_gate(*values[3:])
    packed = type(packed)(packed.weight.at[USED:].set(jnp.nan), packed.widths)
    call = lambda *xs: mj.op(FUSION)(*xs, implementation=implementation)  # noqa: E731
    wanted = jax.jit(call)(*values)
    step = jax.jit(lambda x, residual, weight, gate: call(x, residual, weight, *gate.parts), donate_argnums=(1,))
    for a, b in zip(step(values[0], values[1].copy(), values[2], packed), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
