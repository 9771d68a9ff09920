"""bench/fusions_jax.py on a CPU: a chain computes what single calls do, and goes on from what it updated."""

import jax
import numpy as np
import pytest
import torch

from bench.cases import CASES
from bench.correctness import Checker
from bench.fusions_jax import UPDATED, Chain, call_of, to_jax, to_torch
from moekit.fusions import FUSIONS


@pytest.mark.parametrize("case", ["add_rms_norm 2048", "silu_and_mul 64", "delta_rule_step 2/4", "down_combine 64"])
def test_a_chain_is_its_calls(case):
    """Two calls in one program, run twice: the second run has the updated operands of the first."""
    case = CASES[case]
    sets = [{n: to_jax(x) for n, x in case.make(3, torch.float32).items()} for _ in range(2)]
    one = call_of(case, "xla")
    program = Chain(case, one, sets)
    updated, place = UPDATED.get(case.fusion, (None, 0))
    for _ in range(2):
        wanted = [one(*s.values()) for s in sets]
        state, kept = program()
        for got, want, new in zip(kept, wanted, state, strict=True):
            everything = (*got[:place], new, *got[place:]) if updated else got
            for a, b in zip(everything, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        sets = [s | ({updated: w[place]} if updated else {}) for s, w in zip(sets, wanted, strict=True)]


def test_what_is_updated_is_what_the_declaration_says():
    """The table of updated operands is that of the declarations, and its place that of the output."""
    roles = {f.name: [n for n, s in f.tensors.items() if s.role == "InOut"] for f in FUSIONS.values()}
    assert {n: [u] for n, (u, _) in UPDATED.items()} == {n: r for n, r in roles.items() if r}
    for name, (updated, place) in UPDATED.items():
        case = next(c for c in CASES.values() if c.fusion == name)
        checker = Checker(case, case.make(2, torch.float32))
        assert list(checker.expected[0])[place] == updated


def test_numbers_survive_the_way_there_and_back():
    """bfloat16 and integers too."""
    for x in (torch.randn(3, 4).bfloat16()[:, 1:3], torch.arange(5, dtype=torch.int32)):
        assert torch.equal(to_torch(to_jax(x)), x)
    assert isinstance(to_jax(torch.ones(2)), jax.Array)
