"""Views: what is no part of the base is refused in one sentence, by the constructor too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.errors import AliasError, MoekitError, ShapeError
from moekit.jax import View, add_rms_norm, op, silu_and_mul, view
from moekit.lang import In, cast, f32, fusion

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
        (((0, 1), (0, 0), (1, 1), (6, 10), ((1, 0),)), r"axes \(0, 1\), fixed and picked \(1,\)"),
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


STACK = np.random.default_rng(11).standard_normal((5, 3, 4, 48)).astype(np.float32)
PICKS = {
    "one": (lambda v, i, j: v[i, 1], lambda a, i, j: a[i, 1]),
    "two": (lambda v, i, j: v[i, j], lambda a, i, j: a[i, j]),
    "a part of what is picked": (lambda v, i, j: v[i, j, 1::2, 8:40], lambda a, i, j: a[i, j, 1::2, 8:40]),
    "of a slice": (lambda v, i, j: v[1:4][i, j], lambda a, i, j: a[1:4][i, j]),
    "of steps, turned": (lambda v, i, j: v[::2, :, :, :4][i].transpose(1, 0, 2)[j], lambda a, i, j: a[::2, :, j, :4][i]),
}


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("name", list(PICKS))
def test_elements_picked_at_run_time(name, implementation):
    """One compiled function for every pick, which gives what numpy gives."""
    viewed, sliced = PICKS[name]
    fused = jax.jit(lambda a, i, j: silu_and_mul(viewed(view(a), i, j), implementation=implementation))
    for i, j in ((0, 2), (2, 0), (1, 1)):
        part = sliced(STACK, i, j).astype(np.float64)
        gate, up = np.split(part, 2, axis=-1)
        got = fused(STACK, jnp.int32(i), jnp.int32(j))
        np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(viewed(view(jnp.asarray(STACK)), jnp.int32(i), jnp.int32(j)).array(), part)
    assert fused._cache_size() == 1


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(("pick", "taken"), [(-3, 0), (9, 4), (4, 4)])
def test_a_pick_out_of_range_is_taken_into_range(pick, taken, implementation):
    got = jax.jit(lambda a, i: silu_and_mul(view(a)[i, 0], implementation=implementation))(STACK, jnp.int32(pick))
    np.testing.assert_allclose(got, silu_and_mul(jnp.asarray(STACK[taken, 0]), implementation="xla"), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("dtype", "size"), [("uint8", 300), ("int8", 200), ("int16", 40000), ("uint32", 300)])
def test_a_pick_of_any_integer_dtype(dtype, size):
    """Of more elements than the dtype counts to, after a slice with a start and a step, and through a tree."""
    base, limit = jnp.arange(4 * size, dtype=jnp.float32).reshape(size, 4), min(size - 1, np.iinfo(dtype).max)
    for at in (0, 90, 100, limit):
        assert view(base)[jnp.asarray(at, dtype)].array()[0] == 4 * at
    assert view(base)[100:200][jnp.asarray(90, dtype)].array()[0] == 4 * 190
    assert view(base)[50::2][jnp.asarray(70, dtype)].array()[0] == 4 * 190
    run = jax.jit(lambda v: add_rms_norm(v, v, jnp.zeros(4), implementation="pallas")[1])
    got = run(jax.tree.map(lambda a: a * 2 if a.ndim else a + 300, view(base[:, None])[jnp.asarray(3, "int32")]))
    np.testing.assert_array_equal(got[0], 4 * base[min(303, size - 1)])


def test_one_pick_taken_twice_is_one_place():
    """The operand and where its update goes are the same elements, indexed apart or not; names of operands are no trouble."""
    x = jnp.ones((4, 48))

    @jax.jit
    def update(stack, i):
        return add_rms_norm(x, view(stack)[i, 2], x[0], out=(None, view(stack)[i, 2]), implementation="pallas")[1]

    expected = STACK.copy()
    expected[3, 2] += 1
    np.testing.assert_array_equal(update(jnp.asarray(STACK), jnp.int32(3)), expected)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_what_is_picked_is_updated_and_nothing_beside_it(implementation):
    """A state in a stack, as the model has it: read and written at one layer."""
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((4, 48)).astype(np.float32), rng.standard_normal(48).astype(np.float32)

    @partial(jax.jit, donate_argnums=0)
    def update(stack, i):
        residual = view(stack)[i, 2]
        return add_rms_norm(x, residual, weight, out=(None, residual), implementation=implementation)

    for i in range(5):
        _, stack = update(jnp.asarray(STACK), jnp.int32(i))
        expected = STACK.copy()
        expected[i, 2] += x
        np.testing.assert_array_equal(stack, expected)


@fusion(None, x=In("T H"), x_at_0=In("T H"))
def named_like_a_pick(x, x_at_0):
    """A sum of operands of which one has the name that the other's pick would get."""
    return cast(f32(x) + f32(x_at_0), x.dtype)


def test_an_operand_may_have_the_name_of_a_pick():
    other = np.arange(192, dtype=np.float32).reshape(4, 48)
    run = jax.jit(lambda a, i: op(named_like_a_pick)(view(a)[i, 0], jnp.asarray(other), implementation="pallas"))
    np.testing.assert_array_equal(run(STACK, jnp.int32(2)), STACK[2, 0] + other)


@pytest.mark.parametrize("where", ["eager", "jit"])
def test_a_pick_of_a_base_that_is_cut_over_an_explicit_mesh(where):
    """Array evaluation serves it, an update too; what picks comes along."""
    devices = jax.devices("cpu")[:2]
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,), devices=devices)
    x, weight = np.ones((4, 48), np.float32), np.zeros(48, np.float32)

    def call(stack, i):
        rows = view(stack)[i, 2]
        return silu_and_mul(rows), add_rms_norm(x, rows, weight, out=(None, rows))[1]

    with jax.set_mesh(mesh):
        stack = jax.device_put(STACK, NamedSharding(mesh, P(None, None, "tp")))
        got, updated = (jax.jit(call) if where == "jit" else call)(stack, jnp.int32(3))
    gate, up = np.split(STACK[3, 2].astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=2e-6)
    expected = STACK.copy()
    expected[3, 2] += x
    np.testing.assert_array_equal(updated, expected)


def test_an_output_at_another_pick_than_an_operand_may_overlap_it():
    stack, x = jnp.asarray(STACK), jnp.ones((4, 48))
    with pytest.raises(AliasError, match="out for residual overlaps residual"):
        jax.jit(lambda a, i, j: add_rms_norm(x, view(a)[i, 0], x[0], out=(None, view(a)[j, 0])))(stack, 1, 2)


@pytest.mark.parametrize("pick", [jnp.float32(1), jnp.array([1]), jnp.bool_(True), 1.0, None])
def test_what_picks_no_element(pick):
    with pytest.raises(ShapeError, match=r"View: index .* in dimension 0 of size 5; use integers in range, slices, and JAX"):
        view(jnp.asarray(STACK))[pick]


def test_a_view_with_a_pick_is_a_tree_of_both():
    at = jnp.int32(3)
    leaves, tree = jax.tree.flatten(view(jnp.asarray(STACK))[at, 1:])
    assert len(leaves) == 2
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again.array(), STACK[3, 1:])
