"""bench/fusions_jax.py on a CPU: a chain computes what single calls do, and goes on from what it updated."""

import numpy as np
import pytest
import torch

from bench.cases import CASES
from bench.fusions_jax import UPDATED, Chain, printed, sides, to_jax
from moekit.fusions import FUSIONS


@pytest.mark.parametrize("name", ["add_rms_norm 2048", "silu_and_mul 64", "delta_rule_step 2/4"])
def test_a_chain_is_its_calls(name):
    """Two calls in one program, run twice: the second run has the updated operands of the first."""
    case = CASES[name]
    sets = [{n: to_jax(x) for n, x in case.make(3, torch.float32).items()} for _ in range(2)]
    one = sides(case)["xla"]
    program = Chain(case, one, sets)
    updated, place = UPDATED.get(case.fusion, (None, 0))
    for _ in range(2):
        wanted = [one(s) for s in sets]
        state, kept = program()
        for got, want, new in zip(kept, wanted, state, strict=True):
            everything = (*got[:place], *new.values(), *got[place:])
            for a, b in zip(everything, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        sets = [s | new for s, new in zip(sets, ({updated: w[place]} if updated else {} for w in wanted), strict=True)]


def test_kinds_that_a_fusion_has():
    """Mosaic's kernels beside Pallas's where there are any."""
    for name, wanted in (("silu_and_mul 64", ["pallas", "mosaic"]), ("gate_gemm 648", ["pallas"])):
        case = CASES[name]
        given = {n: to_jax(x) for n, x in case.make(3, torch.float32).items()}
        assert printed(case, given, ("pallas", "mosaic")) == wanted
    assert list(sides(case, ("pallas", "mosaic", "xla"))) == ["pallas", "mosaic", "xla"]


def test_what_is_updated_is_what_the_declaration_says():
    """The table of updated operands is that of the declarations, and its place that of the output."""
    roles = {f.name: [n for n, s in f.tensors.items() if s.role == "InOut"] for f in FUSIONS.values()}
    fusions = {name: entry for name, entry in UPDATED.items() if not name.endswith("_block")}
    assert {n: [u] for n, (u, _) in fusions.items()} == {n: r for n, r in roles.items() if r and n in fusions}
    in_a_model = {"causal_conv1d_step", "qkv_norm_rope", "delta_rule_chunks"}  # are timed
    assert {n for n, r in roles.items() if r} - in_a_model == set(fusions)
    sizes = {"x": (2, 8), "residual": (2, 8), "weight": (8,)}
    outputs = FUSIONS["add_rms_norm"].reference(*(np.ones(s) for s in sizes.values()), eps=1e-6, offset=1.0)
    assert list(outputs)[UPDATED["add_rms_norm"][1]] == "residual"


def test_a_number_is_the_same_in_jax():
    """bfloat16 and integers too, and strided ones."""
    for x in (torch.randn(3, 4).bfloat16()[:, 1:3], torch.arange(5, dtype=torch.int32)):
        got = np.asarray(to_jax(x))
        assert got.dtype.name == str(x.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(got.astype(np.float64), x.double().numpy())
