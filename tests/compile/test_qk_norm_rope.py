"""qk_norm_rope in every implementation: a norm of each head, then a rotary embedding, q and k read where they lie."""

from types import SimpleNamespace

import numpy as np
import programs as good
import pytest

from moekit.compile.tile import interpret
from moekit.errors import ShapeError
from moekit.testing import Call, FusionSuite, implementations, operands, run
from tests.declarations import qk_norm_rope as FUSION

SIZES = {"T": 5, "Q": 3, "K": 2, "D": 20, "R": 4}


class TestQkNormRope(FusionSuite):
    """The suite, with heads that turn in part, whole and by one pair; no tokens; heads and sizes that fill no block."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "Q": 2, "K": 1, "D": 8, "R": 2},
        {"T": 1, "Q": 1, "K": 1, "D": 2, "R": 1},
        {"T": 2, "Q": 5, "K": 1, "D": 16, "R": 8},
        {"T": 2, "Q": 2, "K": 3, "D": 67, "R": 11},
    )
    recipes = ("tiny", "special")


def frequencies(theta: float, half: int) -> np.ndarray:
    """θ^(-i/half) as models hold them."""
    return (1.0 / theta ** (np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)


@pytest.mark.parametrize("implementation", implementations())
def test_far_positions(implementation):
    """At a position of 131072 the fastest pair has turned by as many radians, and is turned by them to float32's accuracy."""
    values = operands(FUSION, SIZES, "float32", seed=2)
    values["positions"] = np.array([0, 1, 131071, 131072, 1000003], values["positions"].dtype)
    values["frequencies"] = frequencies(1e7, SIZES["R"])
    got = run(implementation, Call(FUSION, values)).outputs
    expected = FUSION.reference(**values, eps=1e-6, offset=1.0)
    for name, wanted in expected.items():
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=3e-6 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_computes_the_same(dtype):
    """moekit's Qwen3-Next: within an ulp of the dtype, as both round once."""
    attention = pytest.importorskip("moekit.models.qwen3next.attention")
    import jax.numpy as jnp

    values = operands(FUSION, SIZES | {"D": 64, "R": 8}, dtype, seed=4)
    values["positions"] = np.array([0, 7, 4095, 32768, 131072], values["positions"].dtype)
    values["frequencies"], config = frequencies(1e7, 8), SimpleNamespace(rotary_dim=16, rope_theta=1e7)
    got = run("numpy", Call(FUSION, values)).outputs
    for name in "qk":
        normal = attention.rms_norm(jnp.asarray(values[name])[:, None], jnp.asarray(values[f"{name}_weight"]), 1e-6)
        turned = attention._rotate(normal, jnp.asarray(values["positions"])[:, None], config)
        wanted = np.asarray(attention.round_to(turned, jnp.dtype(dtype))[:, 0], np.float64)
        room = 2.0**-8 if dtype == "bfloat16" else 2e-6
        np.testing.assert_allclose(got[f"{name}_out"].astype(np.float64), wanted, rtol=room, atol=1e-5, err_msg=name)


def test_a_projection_is_read_where_it_lies():
    """q with its gate behind each head and k behind them all, in one product's columns: the bits of arrays of their own."""
    values = operands(FUSION, SIZES, "bfloat16", seed=6)
    columns = np.random.default_rng(6).standard_normal((5, 160)).astype(values["q"].dtype)
    q, k = columns[:, :120].reshape(5, 3, 2, 20)[:, :, 0], columns[:, 120:].reshape(5, 2, 20)
    assert np.shares_memory(q, columns)
    assert np.shares_memory(k, columns)
    got = []
    for lies in (values | {"q": q, "k": k}, values | {"q": q.copy(), "k": k.copy()}):
        outs = {f"{n}_out": np.zeros_like(lies[n], order="C") for n in "qk"}
        interpret.run(good.planned(Call(FUSION, values).graph), lies | outs, SIZES)
        got.append(outs)
    for name, array in got[0].items():
        np.testing.assert_array_equal(array, got[1][name])


def test_derivatives():
    """Through sine, cosine and concat: those of the same in plain float64 torch."""
    torch = pytest.importorskip("torch")
    from moekit.torch import op

    values = {n: torch.from_numpy(v) for n, v in operands(FUSION, SIZES, "float32", seed=8).items()}
    names, half = ("q", "k", "q_weight", "k_weight", "frequencies"), SIZES["R"]

    def plain(values):
        angles = (values["positions"][:, None] * values["frequencies"])[:, None]
        for n in "qk":
            x = values[n] * torch.rsqrt((values[n] ** 2).mean(-1, keepdim=True) + 1e-6) * (1 + values[f"{n}_weight"])
            a, b, rest = x.tensor_split((half, 2 * half), -1)
            yield torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)

    found = []
    for call, dtype in ((lambda v: op(FUSION)(*v.values()), torch.float32), (plain, torch.float64)):
        mine = {n: v.detach().to(dtype, copy=True).requires_grad_() if n in names else v for n, v in values.items()}
        sum((out * torch.arange(out.numel()).view(out.shape).sin()).sum() for out in call(mine)).backward()
        found.append([mine[n].grad for n in names])
    for name, got, wanted in zip(names, *found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_more_pairs_than_a_head_has():
    """One sentence, before anything is compiled."""
    with pytest.raises(ShapeError, match="frequencies has 5 elements, heads have 8; pass half as many at most"):
        Call(FUSION, operands(FUSION, SIZES | {"D": 8, "R": 5})).graph  # noqa: B018
