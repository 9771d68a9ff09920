"""The layers of bench/moe_block.py at a small size, on a GPU if there is one: each computes the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bench import layer, layer_jax
from bench.cases import rows
from bench.correctness import array
from bench.layer import Sizes
from bench.moe_block import judged, reference_of

SMALL = Sizes(2, hidden=64, experts=32, k=4, intermediate=48)


def named(w: dict, array) -> dict[str, np.ndarray]:
    """Weights as the reference wants them."""
    gates = dict(zip(("gate_up", "router", "shared_gate"), map(array, w["gates"]), strict=True))
    return gates | {n: array(w[n]) for n in ("norm", "down")}


@pytest.mark.parametrize("part", ["moe", "gate"])
@pytest.mark.parametrize("name", ["moekit", "moekit, epilogue", "eager"])
def test_a_layer_in_pytorch_is_the_reference(name, part):
    """In float32, where every row chooses the reference's experts; another seed would be as good."""
    torch.manual_seed(3)
    w = layer.weights(SMALL, torch.float32)
    x, residual = (rows(7, 64, dtype=torch.float32) for _ in range(2))
    wanted = reference_of(named(w, array), array(x), array(residual), SMALL)
    got = layer.layers()[name](w, x.clone(), residual.clone(), SMALL.k, part)
    found = judged([array(g) for g in got], wanted, part)
    assert found["relative"] < 1e-5
    assert found["ids"] == 1.0


@pytest.mark.parametrize("part", ["moe", "gate"])
@pytest.mark.parametrize("name", list(layer_jax.layers()))
def test_a_layer_in_jax_is_the_reference(name, part):
    """The same in JAX."""
    keys = jax.random.split(jax.random.key(3), 3)
    w = layer_jax.weights(SMALL, jnp.float32, keys[0])
    x, residual = (jax.random.normal(k, (7, 64)) for k in keys[1:])
    wanted = reference_of(named(w, np.asarray), np.asarray(x), np.asarray(residual), SMALL)
    got = jax.jit(partial(layer_jax.layers()[name], k=SMALL.k, part=part))(w, x, residual)
    found = judged([np.asarray(g) for g in got], wanted, part)
    assert found["relative"] < 1e-5
    assert found["ids"] == 1.0


def test_a_wrong_activation_is_seen():
    """What is judged are all outputs but x of the gate part, which every side leaves normalised."""
    wanted = [np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 3)), np.ones((2, 2)), np.array([[0, 1], [2, 3]])]
    got = [w.copy() for w in wanted]
    got[0] += 1
    assert judged(got, wanted, "gate") == {"relative": 0.0, "ids": 1.0}
    got[2][1] *= 2
    got[4][0, 1] = 7
    found = judged(got, wanted, "gate")
    assert found["relative"] > 0.5
    assert found["ids"] == 0.5


def test_a_chain_has_as_many_layers_as_weights():
    """Two layers one after the other are the chain of two."""
    keys = jax.random.split(jax.random.key(4), 4)
    stack = [layer_jax.weights(SMALL, jnp.float32, k) for k in keys[:2]]
    x, residual = (jax.random.normal(k, (3, 64)) for k in keys[2:])
    one = layer_jax.layers()["xla, three gemms"]
    a, b = x, residual
    for w in stack:
        a, b, *_ = one(w, a, b, SMALL.k, "moe")
    got = layer_jax.chain(one, SMALL.k, "moe")(stack, x, residual)
    np.testing.assert_allclose(got[0], a, rtol=1e-5, atol=1e-5)
    assert len(got[2]) == 2
