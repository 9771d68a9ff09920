"""The JAX face: outputs that share a base, derivatives of derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moekit.jax import add_rms_norm, silu_and_mul, view


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_two_outputs_in_one_base(implementation):
    """Both come back as the one base in which both were written."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)
    base = jnp.full((4, 40), 7.0)
    outs = (view(base)[:, :16], view(base)[:, 20:36])
    wanted = add_rms_norm(x, 2 * x, jnp.ones(16), implementation="xla")
    got = add_rms_norm(x, 2 * x, jnp.ones(16), implementation=implementation, out=outs)
    for whole in got:
        np.testing.assert_allclose(whole[:, :16], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(whole[:, 20:36], wanted[1], rtol=1e-5)
        assert (whole[:, 16:20] == 7).all()
        assert (whole[:, 36:] == 7).all()


def test_second_derivative():
    """The gradient of a gradient is array evaluation's."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8)), jnp.float32)

    def curvature(implementation):
        first = jax.grad(lambda a: (silu_and_mul(a, implementation=implementation) ** 2).sum())
        return jax.grad(lambda a: (first(a) ** 2).sum())(x)

    np.testing.assert_allclose(curvature("pallas"), curvature("xla"), rtol=1e-4, atol=1e-5)
