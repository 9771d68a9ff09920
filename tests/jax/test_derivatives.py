"""Derivatives through kernels, both modes and their mixtures, against differences of the float64 references."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moekit.lang as ml
from moekit.errors import UnavailableError
from moekit.jax import add_rms_norm, op, silu_and_mul, topk_softmax, view
from moekit.lang import In, fusion
from tests.jax.conftest import ROUNDED

close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)


def narrow(arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def random_like(arrays, seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(np.shape(a)) for a in arrays)


def moved(arrays, by, step):
    return tuple(a + step * b for a, b in zip(arrays, by, strict=True))


def slope(function, arrays, by, step=1e-5):
    """The directional derivative of a function of float64 arrays to a dict."""
    high, low = (function(moved(arrays, by, s)) for s in (step, -step))
    return {n: (high[n] - low[n]) / (2 * step) for n in high}


def weighted(function, weights):
    """The sum of a dict's arrays, each times its weights."""
    return lambda *arrays: sum((out * weights[n]).sum() for n, out in function(*arrays).items())


@pytest.mark.usefixtures("smooth")
def test_first_derivatives(call, platform):
    """jvp, linearize, vjp: each tangent is the reference's slope, each gradient its transpose."""
    face, x = call.face("pallas"), narrow(call.floats)
    by = random_like(x, 1)
    wanted = slope(call.reference, call.floats, by)
    weights = {n: w.astype(np.float32) for n, w in zip(wanted, random_like(wanted.values(), 2), strict=True)}

    @jax.jit
    def every(x, by, weights):
        primal, linear = jax.linearize(face, *x)
        return face(*x), primal, jax.jvp(face, x, by), linear(*by), jax.vjp(face, *x)[1](weights)

    plain, linear_primal, (primal, tangent), along, grads = every(x, narrow(by), weights)
    for n in wanted:
        close(primal[n], plain[n], rtol=1e-5, atol=1e-6)
        close(linear_primal[n], plain[n], rtol=1e-5, atol=1e-6)
        close(tangent[n], wanted[n], err_msg=n)
        close(along[n], wanted[n], err_msg=n)
    for i, grad in enumerate(grads):
        alone = tuple(b if j == i else np.zeros_like(b) for j, b in enumerate(by))
        mine = slope(call.reference, call.floats, alone)
        close((np.asarray(grad, np.float64) * by[i]).sum(), sum((mine[n] * w).sum() for n, w in weights.items()), atol=2e-3)


@pytest.mark.usefixtures("smooth")
def test_second_derivatives(call, platform):
    """Forward over reverse, reverse over forward and forward over forward: the reference's curvature along a direction."""
    x, by = narrow(call.floats), random_like(call.floats, 1)
    outs = call.reference(call.floats)
    weights = dict(zip(outs, random_like(outs.values(), 2), strict=True))
    loss, v, step = weighted(call.face("pallas"), weights), narrow(by), 1e-4
    at = lambda s: weighted(lambda *a: call.reference(a), weights)(*moved(call.floats, by, s))  # noqa: E731
    wanted = (at(step) - 2 * at(0) + at(-step)) / step**2

    def along(f):
        return lambda *a: jax.jvp(f, a, v)[1]

    every = tuple(range(len(x)))
    dot = lambda grads: sum((g * b).sum() for g, b in zip(grads, v, strict=True))  # noqa: E731
    got = jax.jit(lambda *a: (dot(jax.jvp(jax.grad(loss, every), a, v)[1]), dot(jax.grad(along(loss), every)(*a)),
                              along(along(loss))(*a)))(*x)  # fmt: skip
    for curvature in got:
        close(curvature, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["silu_and_mul", "topk_softmax"])
def test_whole_jacobians(name, call_named, platform):
    """jacfwd, jacrev and hessian, which are vmaps of the linear maps, in every direction at once."""
    call = call_named(name)
    x, face = narrow(call.floats)[0][:2], call.face("pallas")
    rest = [a[:2] for a in narrow(call.floats)[1:]]
    one = lambda a: next(iter(face(a, *rest).values()))  # noqa: E731
    numbers = lambda a: next(iter(call.reference((a, *(np.asarray(r, np.float64) for r in rest))).values()))  # noqa: E731
    start = np.asarray(x, np.float64)
    units = np.eye(start.size).reshape(start.size, *start.shape)
    wanted = np.stack([(numbers(start + 1e-6 * u) - numbers(start - 1e-6 * u)) / 2e-6 for u in units], -1)
    wanted = wanted.reshape(*wanted.shape[:-1], *start.shape)
    close(jax.jit(jax.jacfwd(one))(x), wanted)
    close(jax.jit(jax.jacrev(one))(x), wanted)
    square = lambda a: (one(a) ** 2).sum()  # noqa: E731
    twice = jax.jit(jax.hessian(square))(x)
    along = random_like([x], 3)[0]
    at = lambda s: (numbers(start + s * along) ** 2).sum()  # noqa: E731
    close(np.einsum("abcd,ab,cd", twice, along, along), (at(1e-4) - 2 * at(0) + at(-1e-4)) / 1e-8, rtol=5e-3, atol=5e-3)


def test_derivatives_of_ids_are_none(platform):
    """An integer output moves with nothing; an integer operand moves nothing."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    (_, ids), (_, along) = jax.jvp(lambda a: topk_softmax(a, 2, implementation="pallas"), (x,), (x,))
    assert ids.dtype == jnp.int32
    assert along.dtype == jax.dtypes.float0
    assert along.shape == ids.shape

    @fusion(lambda table, ids: {"out": table[ids]}, table=In("S H"), ids=In("T", dtype="int32"))
    def rows(table, ids):
        """Rows of a table, squared."""
        row = ml.gather(table, ids, over="S")
        return row * row

    face, at = partial(op(rows), implementation="pallas"), jnp.asarray([2, 0, 2, 9], jnp.int32)
    _, tangent = jax.jvp(face, (x, at), (jnp.ones_like(x), np.zeros(4, jax.dtypes.float0)))
    wanted = np.concatenate([2 * np.asarray(x)[[2, 0, 2]], np.zeros((1, 8))])
    close(tangent if tangent.shape == wanted.shape else tangent.T, wanted)
    grad = jax.grad(lambda a: face(a, at).sum())(x)
    close(grad, 2 * np.asarray(x) * np.array([1, 0, 2])[:, None])
    still = jax.jvp(lambda i: face(x, i), (at,), (np.zeros(4, jax.dtypes.float0),))[1]
    assert not np.asarray(still).any()


def test_derivatives_through_views(platform):
    """With respect to a base: of what is read in it, and of what is left when it is written to."""
    rng = np.random.default_rng(5)
    base, other = (jnp.asarray(rng.standard_normal((3, 24)), jnp.float32) for _ in range(2))
    by = jnp.asarray(rng.standard_normal(base.shape), jnp.float32)
    read = lambda b: silu_and_mul(view(b)[:, 3:19], implementation="pallas")  # noqa: E731
    plain = lambda b: silu_and_mul(b[:, 3:19], implementation="xla")  # noqa: E731
    close(jax.jvp(read, (base,), (by,))[1], jax.jvp(plain, (base,), (by,))[1])
    close(jax.grad(lambda b: read(b).sum())(base), jax.grad(lambda b: plain(b).sum())(base))

    def written(b, implementation):
        return silu_and_mul(view(other)[:, 4:20], implementation=implementation, out=view(b)[:, 8:16])

    got = jax.jvp(lambda b: written(b, "pallas"), (base,), (by,))[1]
    close(got, np.where((np.arange(24) < 8) | (np.arange(24) >= 16), by, 0))

    def both(b, implementation):
        return silu_and_mul(view(b)[:, :16], implementation=implementation, out=view(b)[:, 16:])

    wanted = jax.jvp(lambda b: both(b, "xla"), (base,), (by,))[1]
    close(jax.jvp(lambda b: both(b, "pallas"), (base,), (by,))[1], wanted)


def test_derivatives_of_what_is_updated_in_place(platform):
    """A donated residual is overwritten by the kernel; its tangent is of the value that was there."""
    rng = np.random.default_rng(6)
    x, residual, weight = (rng.standard_normal(s).astype(np.float32) for s in ((3, 16), (3, 16), (16,)))
    by = rng.standard_normal((3, 16)).astype(np.float32)

    def both(residual, by, implementation):
        run = lambda r: add_rms_norm(jnp.asarray(x), r, jnp.asarray(weight), implementation=implementation)  # noqa: E731
        return jax.jvp(run, (residual,), (by,))

    wanted = both(jnp.asarray(residual), jnp.asarray(by), "xla")
    donated = jax.jit(partial(both, implementation="pallas"), donate_argnums=0)
    got = donated(jnp.asarray(residual), jnp.asarray(by))
    for mine, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(mine, want, rtol=1e-5, atol=1e-5)


def test_derivatives_under_checkpoint_and_vmap(platform):
    """jax.checkpoint, and vmap inside and outside of both modes."""
    x = jnp.asarray(np.random.default_rng(7).standard_normal((2, 3, 16)), jnp.float32)
    loss = {i: (lambda a, i=i: (silu_and_mul(a, implementation=i) ** 2).sum()) for i in ("pallas", "xla")}
    wanted = jax.grad(loss["xla"])(x[0])
    close(jax.grad(jax.checkpoint(loss["pallas"]))(x[0]), wanted)
    close(jax.vmap(jax.grad(loss["pallas"]))(x)[0], wanted)
    close(jax.grad(lambda a: jax.vmap(loss["pallas"])(a).sum())(x)[0], wanted)
    along = lambda i: lambda a: jax.jvp(loss[i], (a,), (jnp.ones_like(a),))[1]  # noqa: E731
    close(jax.vmap(along("pallas"))(x), jax.vmap(along("xla"))(x))
    whole = lambda a: jax.vmap(loss["pallas"])(a).sum()  # noqa: E731
    close(jax.jvp(whole, (x,), (jnp.ones_like(x),))[1], jax.vmap(along("xla"))(x).sum())


@pytest.mark.usefixtures("smooth")
def test_a_gradient_keeps_the_operands_alone(call):
    """What waits for the backward pass is no more than the operands, and the kernels run once."""
    x = narrow(call.floats)
    back = jax.eval_shape(lambda *a: jax.vjp(call.face("pallas"), *a)[1], *x)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back)) <= sum(a.nbytes for a in call.placed(x))

    def launches(function):
        return str(jax.make_jaxpr(function)(*x)).count("pallas_call[")

    loss = lambda *a: sum(out.sum() for out in call.face("pallas")(*a).values())  # noqa: E731
    assert launches(jax.grad(loss)) == launches(loss) > 0


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_what_is_rounded_to_float8_has_no_derivative(call_named, name, implementation):
    """One sentence, and no gradient of zeros."""
    made = call_named(name)
    whole, arrays = made.whole(implementation), tuple(jnp.asarray(made.arrays[i], jnp.float32) for i in made.moving)

    def loss(*x):
        return sum(out.astype(jnp.float32).sum() for out in whole(*made.placed(x)).values())

    assert np.isfinite(loss(*arrays))
    with pytest.raises(UnavailableError, match="what is rounded to float8 has no derivative; detach its operands, or take"):
        jax.grad(loss)(*arrays)
    with pytest.raises(UnavailableError, match="what is rounded to float8 has no derivative"):
        jax.jvp(loss, arrays, arrays)
