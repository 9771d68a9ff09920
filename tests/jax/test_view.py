"""Views: what is no part of the base is refused in one sentence, by the constructor too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moekit.errors import MoekitError, ShapeError
from moekit.jax import View, silu_and_mul, view

BASE = np.arange(60, dtype=np.float32).reshape(6, 10)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (((0, 1), (0, 0), (1, 1), (7, 10)), "dimension 0 .* reaches element 6 of base axis 0, which has 6"),
        (((0, 1), (0, 4), (1, 2), (6, 4)), "dimension 1 .* reaches element 10 of base axis 1, which has 10"),
        (((1, 0), (0, 0), (1, 1), (10, 7)), "dimension 1 .* base axis 0"),
        (((0, 1), (-1, 0), (1, 1), (6, 10)), "start -1 .* dimension 0"),
        (((0, 1), (0, 0), (0, 1), (6, 10)), "step 0 .* dimension 0"),
        (((0, 1), (0, 9), (1, -1), (6, 10)), "step -1 .* dimension 1"),
        (((0, 1), (0, 0), (1, 1), (6, -1)), "size -1 .* dimension 1"),
        (((0, 1), (7, 0), (1, 1), (0, 10)), "start 7 .* dimension 0"),
        (((0, 0), (0, 0), (1, 1), (6, 6)), r"axes \(0, 0\)"),
        (((0, 2), (0, 0), (1, 1), (6, 10)), r"axes \(0, 2\)"),
        (((0,), (0,), (1,), (6,)), r"axes \(0,\)"),
        (((0, 1), (0,), (1, 1), (6, 10)), "axes, starts, steps and shape"),
        (((0,), (0,), (1,), (6,), ((1, 10),)), "element 10 of base axis 1, which has 10"),
        (((0,), (0,), (1,), (6,), ((1, -1),)), "element -1 of base axis 1"),
        (((0, 1), (0, 0), (1, 1), (6, 10), ((1, 0),)), r"axes \(0, 1\) and fixed \(1,\)"),
        (((0, 1), (0.5, 0), (1, 1), (6, 10)), "0.5"),
    ],
)
def test_what_is_outside_the_base_is_refused(parts, said):
    with pytest.raises(ShapeError, match=said) as caught:
        View(jnp.asarray(BASE), *parts)
    assert str(caught.value).startswith("View: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (((0, 1), (0, 0), (1, 1), (6, 10)), BASE),
        (((1, 0), (1, 2), (3, 1), (3, 4)), BASE[2:6, 1::3].T),
        (((1,), (4,), (2,), (3,), ((0, 5),)), BASE[5, 4::2]),
        (((0, 1), (6, 0), (1, 1), (0, 10)), BASE[6:]),
    ],
)
def test_what_is_inside_is_taken(parts, wanted):
    np.testing.assert_array_equal(View(jnp.asarray(BASE), *parts).array(), wanted)


def test_numpy_integers_are_integers():
    v = View(jnp.asarray(BASE), (0, 1), tuple(np.zeros(2, np.int64)), (1, 1), (6, np.int32(10)))
    np.testing.assert_array_equal(v[np.int64(2)].array(), BASE[2])
    assert all(type(n) is int for n in (*v.starts, *v.shape))


def test_indices_that_are_none():
    v = view(jnp.asarray(BASE))
    for index in (True, 6, -7, 1.0, None, "a"):
        with pytest.raises(ShapeError, match="View: index"):
            v[index]
    with pytest.raises(ShapeError, match="is no order"):
        v.transpose(0, 0)


def test_a_base_that_is_no_array():
    for base in ([[1.0]], 3.0, "x"):
        with pytest.raises(MoekitError, match="it must be a JAX array"):
            view(base)
    np.testing.assert_array_equal(view(BASE)[1:].set(jnp.zeros((5, 10)))[0], BASE[0])


def test_a_view_is_a_pytree_of_anything():
    """JAX rebuilds trees around leaves that are no arrays, and around arrays with a batch dimension more."""
    v = view(jnp.asarray(BASE))[:, 2:6]
    assert jax.tree.map(lambda x: None, v).base is None
    assert jax.tree.map(lambda x: x.shape, v).base == (6, 10)
    many = jax.tree.map(lambda x: jnp.stack([x, x + 1]), v)
    both = jax.vmap(lambda w: silu_and_mul(w, implementation="pallas"))(many)
    np.testing.assert_allclose(both[0], silu_and_mul(v, implementation="pallas"), rtol=1e-6)
    assert jax.eval_shape(lambda w: silu_and_mul(w), v).shape == (6, 2)
