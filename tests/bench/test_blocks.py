"""The MoE block, in every way that bench/layer.py and bench/layer_jax.py compute it, and the judge of its outputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bench import layer, layer_jax
from bench.cases import block_case
from bench.correctness import Checker, judge
from bench.fusions_jax import Chain, to_jax
from bench.sides import sides

SMALL = {part: block_case(part, 24, hidden=64, experts=32, k=4) for part in ("moe", "gate")}
ON_CPU = ("moekit", "moekit, epilogue", "eager")


def checker(part):
    """In float32, where every row chooses the reference's experts; another seed would be as good."""
    torch.manual_seed(3)
    return Checker(SMALL[part], SMALL[part].make(9, torch.float32))


def right(found):
    assert found["relative"] < 1e-5
    assert found["ids"] == 1.0
    assert "error" not in found


@pytest.mark.parametrize(("part", "name"), [*(("moe", name) for name in ON_CPU), ("gate", "moekit, epilogue")])
def test_a_layer_in_pytorch_is_the_reference(name, part):
    make = sides(SMALL[part], compiled=False)[name]
    right(checker(part)(lambda o: make(o)()))


@pytest.mark.parametrize(("part", "name"), [*(("moe", name) for name in layer_jax.layers()), ("gate", "xla, one gemm")])
def test_a_layer_in_jax_is_the_reference(name, part):
    check = checker(part)
    given = layer_jax.packed({n: to_jax(x) for n, x in check.operands.items()})
    one = partial(layer_jax.layers()[name], k=4, part=part)
    right(check(lambda _: [*map(np.asarray, one(given))]))


def test_peers_have_the_same_sides_in_both_parts():
    """What they compute can be seen on a GPU alone; that they are all there, here."""
    names = [f"peers: {norm} norm, {gemm}" for norm in ("sgl", "flashinfer") for gemm in ("three gemms", "one padded gemm")]
    assert [name for name in sides(SMALL["moe"]) if name.startswith("peers")] == names
    assert list(sides(SMALL["gate"])) == list(layer.layers())


def test_a_wrong_output_is_seen():
    """All outputs are judged; ids in any order."""
    wanted = [np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 3)), np.ones((2, 2)), np.array([[0, 1], [2, 3]])]
    got = [w.copy() for w in wanted]
    got[4] = got[4][:, ::-1]
    assert judge(got, wanted) == {"relative": 0.0, "ids": 1.0}
    got[2][1] *= 2
    got[4][0, 1] = 7
    found = judge(got, wanted)
    assert found["relative"] > 0.5
    assert found["ids"] == 0.5


def test_a_chain_has_operands_of_its_own():
    """Two layers in one program are the two by themselves, and what they update is kept for the next run."""
    case, one = SMALL["gate"], partial(layer_jax.layers()["jnp, three gemms"], k=4, part="gate")
    drawn = [{n: to_jax(x) for n, x in case.make(3, torch.float32).items()} for _ in range(2)]
    chain = Chain(case, one, drawn)
    state, kept = chain()
    for operands, new, others in zip(drawn, state, kept, strict=True):
        x, residual, *rest = one(operands)
        np.testing.assert_allclose(new["residual"], residual, rtol=1e-5)
        for a, b in zip(others, (x, *rest), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jnp.array_equal(chain.state[0]["residual"], state[0]["residual"])
    assert isinstance(state[0]["residual"], jax.Array)
