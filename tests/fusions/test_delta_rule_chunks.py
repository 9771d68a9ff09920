"""delta_rule_chunks in every implementation: chunks one after the other, and what a head remembers of them."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["delta_rule_chunks"]
SIZES = {"T": 2, "M": 3, "Cq": 5, "Ck": 5, "Cv": 5, "K": 2, "V": 4, "Dk": 6, "Dv": 17}


class TestDeltaRuleChunks(FusionSuite):
    """The suite, with chunks and heads that fill no block, and one of each."""

    fusion = FUSION
    sizes = (SIZES, {**SIZES, "T": 0}, dict.fromkeys(SIZES, 1), {**SIZES, "M": 1, "K": 1, "V": 1, "Dv": 3})


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_the_delta_rule_token_by_token(implementation, dtype):
    """Chunks of one token: what is solved is beta, and `attend` the scaled product of q and k."""
    rng, steps, heads, dim = np.random.default_rng(3), 6, 2, 8
    sizes = SIZES | {"T": 1, "M": steps, "Cq": 1, "Ck": 1, "Cv": 1, "K": heads, "V": heads, "Dk": dim}
    values = operands(FUSION, sizes, dtype, seed=4)
    k, q, v = (values[n].astype(np.float64)[0, :, 0] for n in "kqv")  # [M, heads, …]
    beta, decay = rng.random((steps, heads)), np.exp(-rng.random((steps, heads)))
    of_q, of_k = rng.random((2, steps, heads)) / dim
    for name, a in {"solved": beta, "attend": np.einsum("nvd,nvd->nv", q, k) * of_q * of_k}.items():
        values[name][:, :, :, 0, 0] = a
        values[name][:, :, :, 1, 0] = a - values[name][:, :, :, 0, 0].astype(np.float64)
    for name, a in {"since": of_k * decay, "left": of_k, "asked": of_q * decay}.items():
        values[name][:] = a[None, :, None]
    values["fade"][:] = decay[None]
    # new = beta·(v - (of_k·k)ᵀ·(decay·S)), S = decay·S + of_k·k⊗new: the step's own words.
    got, state = run(implementation, Call(FUSION, values)).outputs, values["state"].astype(np.float64)[0]
    for n in range(steps):
        state = state * decay[n, :, None, None]
        key, query = k[n] * of_k[n, :, None], q[n] * of_q[n, :, None]
        new = (v[n] - np.einsum("vd,vde->ve", key, state)) * beta[n, :, None]
        state = state + key[..., None] * new[:, None]
        read = got["read"].astype(np.float64)[0, n, 0]
        wanted = np.einsum("vd,vde->ve", query, state)
        np.testing.assert_allclose(read, wanted, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(got["state"][0], state, rtol=1e-3, atol=1e-4 * np.abs(state).max())


def test_a_program_has_a_heads_state_but_for_its_columns():
    """At the 80B's size over two GPUs: 16 heads of 128 columns are 128 programs for 132 multiprocessors.

    Two chunks are on their way while one is worked on.
    """
    sizes = {"T": 1, "M": 128, "Cq": 64, "Ck": 64, "Cv": 64, "K": 8, "V": 16, "Dk": 128, "Dv": 128}
    assert str(heuristic(FUSION.trace(example(FUSION, sizes, "bfloat16")))) == (
        "tile:T:1 loop:M:1 whole:Cq:64 whole:Dk:128 whole:Ck:64 tile:V:1 whole:Cv:64 tile:Dv:16 warps:4 stages:3 dependent"
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"Cv": 4}, r"chunks of q, k and v have \[5, 5, 4\] tokens; they must be as long"),
        ({"Cq": 257, "Ck": 257, "Cv": 257}, "chunks have 257 tokens; a call takes at most 256"),
        ({"V": 3}, "v has 3 heads and k has 2; V must be a multiple of K"),
    ],
)
def test_refused(wrong, why):
    """In one sentence."""
    with pytest.raises(ShapeError, match=why):
        FUSION.trace(Call(FUSION, operands(FUSION, {**SIZES, **wrong}, "float32")).binding)
