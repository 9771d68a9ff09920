"""JAX's settings, and what JAX would narrow: the same numbers, or one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moekit.lang as ml
from moekit.compile.schedule import Schedule
from moekit.errors import DtypeError
from moekit.jax import op, silu_and_mul, topk_softmax, view
from moekit.lang import In, fusion
from moekit.testing import Call, check

SETTINGS = {
    "rank promotion": ("jax_numpy_rank_promotion", "raise"),
    "strict dtypes": ("jax_numpy_dtype_promotion", "strict"),
    "64 bits": ("jax_enable_x64", True),
    "NaN": ("jax_debug_nans", True),
    "no jit": ("jax_disable_jit", True),
    "leaks": ("jax_check_tracer_leaks", True),
    "transfers": ("jax_transfer_guard", "disallow"),
}


@pytest.fixture(params=list(SETTINGS))
def setting(request):
    """One of JAX's settings."""
    name, value = SETTINGS[request.param]
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield request.param
    jax.config.update(name, before)


@pytest.mark.parametrize("name", ["gate_projections", "topk_softmax"])
def test_faces_under_settings(setting, name, call_named):
    """Kernels, and array evaluation with its gradient, whatever JAX is told to refuse or to round."""
    call = call_named(name)
    wanted = call.reference(call.floats)
    with jax.transfer_guard("allow"):
        x = [jax.device_put(np.float32(a)) for a in call.floats]
    outs = [call.face("pallas")(*x), call.face("xla")(*x)]
    if setting != "no jit":  # transposing op by op takes a minute
        jax.jit(jax.grad(lambda *a: sum(out.sum() for out in call.face("pallas")(*a).values())))(*x)
    with jax.transfer_guard("allow"):
        for got in outs:
            for n, out in got.items():
                np.testing.assert_allclose(out, wanted[n], rtol=1e-4, atol=1e-4)


@fusion(lambda x, w: {"out": x.astype(float) @ w.astype(float)}, x=In("T D"), w=In("D N"))
def product(x, w):
    """x·w."""
    return ml.contract(x, w, over="D")


@fusion(lambda x, n: {"out": x[:, :5].astype(float).sum(1) + [r[:k].astype(float).sum() for r, k in zip(x, n, strict=True)]},
        x=In("T H"), n=In("T", dtype="int64"))  # fmt: skip
def ended(x, n):
    """Sums of the first five elements of a row, and of so many as data say."""
    return ml.sum(ml.f32(x), "H", upto=5) + ml.sum(ml.f32(x), "H", upto=n)


@fusion(lambda x: {"out": x.astype(float) * x.astype(float).sum(1, keepdims=True)}, x=In("T H"))
def scaled(x):
    """Rows times what they add up to."""
    return x * ml.sum(x, over="H")


LOOPS = {
    "turn by turn": (product, "tile:T:16 loop:D:16 tile:N:16"),
    "one by one": (scaled, "tile:T:1 loop:H:1"),
    "flat": (product, "tile:T:64 loop:D:16 tile:N:16 parts:D:2"),
    "as far as data say": (ended, "tile:T:1 loop:H:16"),
    "to the end, one by one": (ended, "tile:T:1 loop:H:1"),
}


@pytest.mark.parametrize("loop", list(LOOPS))
def test_loops_in_64_bits(loop):
    """Numbers of turns are int32 in kernels, whatever JAX counts in; lengths of 64 bits are not cut."""
    (declared, schedule), rng = LOOPS[loop], np.random.default_rng(3)
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("x", (3, 40)), ("w", (40, 5)))}
    values |= {"n": np.array([-(2**40), 37, 2**32 + 1])}
    values = {n: values[n] for n in declared.tensors}
    with jax.enable_x64(True):
        check("pallas", Call(declared, values, schedule=Schedule.parse(schedule)))


@pytest.mark.parametrize("precision", ["bfloat16", "tensorfloat32"])
def test_products_stay_float32(precision, call_named):
    """Every product of a program and of its gradient asks for IEEE float32, whatever the default is."""
    call = call_named("gate_projections")
    x = [jnp.asarray(a, jnp.float32) for a in call.floats]
    loss = lambda *a: sum(out.sum() for out in call.face("pallas")(*a).values())  # noqa: E731
    with jax.default_matmul_precision(precision):
        text = str(jax.make_jaxpr(jax.grad(loss, tuple(range(len(x)))))(*x))
    products = text.count("dot_general[")
    assert products > 4
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def _gathered():
    @fusion(lambda table, ids: {"out": table[ids].T}, table=In("S H"), ids=In("T", dtype=("int32", "int64")))
    def rows(table, ids):
        """Rows of a table."""
        return ml.gather(table, ids, over="S")

    return op(rows)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_ids_that_int32_does_not_hold(implementation):
    """Refused where JAX would wrap them round to rows that exist; taken where int64 is allowed, as rows that do not."""
    rows, table = _gathered(), jnp.arange(12.0).reshape(3, 4)
    far = np.array([1, 2**32 + 1, -(2**40)])
    said = "is int64, which JAX makes int32 without jax_enable_x64, and its values are not known to fit that"
    with pytest.raises(DtypeError, match=f"^rows: ids {said}; enable it, or pass int32$"):
        rows(table, far, implementation=implementation)
    with pytest.raises(DtypeError, match=f"^view: the base {said}"):
        rows(table, view(far), implementation=implementation)
    near = rows(table, far[:1], implementation=implementation)
    np.testing.assert_array_equal(np.asarray(near).reshape(-1), table[1])
    with jax.enable_x64(True):
        wide = jnp.asarray(far)
        got = np.asarray(rows(table, wide, implementation=implementation)).reshape(4, 3)
        np.testing.assert_array_equal(got, np.stack([np.asarray(table[1]), np.zeros(4), np.zeros(4)], 1))
    for call in (rows, jax.jit(rows, static_argnames="implementation")):
        with pytest.raises(DtypeError, match=f"^rows: ids {said}"):
            call(table, wide, implementation=implementation)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_integers_that_jax_does_not_have(implementation):
    """A declaration that computes in int64 needs jax_enable_x64, or its sums would wrap round."""

    @fusion(lambda x: {"out": x.astype(np.int64) * 3}, x=In("T", dtype="int32"))
    def tripled(x):
        """Three times x."""
        return ml.cast(x, "int64") * 3

    x = jnp.asarray([2**30], jnp.int32)
    with pytest.raises(DtypeError, match=r"^tripled: it computes in int64, which JAX has only with jax_enable_x64; enable it"):
        op(tripled)(x, implementation=implementation)
    with jax.enable_x64(True):
        assert op(tripled)(x, implementation=implementation)[0] == 3 * 2**30


def test_what_is_no_array_of_numbers():
    """Refused with the operand's name."""
    for wrong, said in ((np.array([["a"]]), "logits is <U1"), (np.array([[object()]]), "logits is object")):
        with pytest.raises(DtypeError, match=f"^topk_softmax: {said}; it must be an array of numbers"):
            topk_softmax(wrong, 1)
    with pytest.raises(DtypeError, match=r"^silu_and_mul: gate_up is float64, which JAX makes float32"):
        silu_and_mul(np.array([[1e300, 1.0]]))
    np.testing.assert_allclose(silu_and_mul(np.array([[1.0, 1.0]])), [[1 / (1 + np.exp(-1))]], rtol=1e-6)
    for k in (True, 2.0, np.int64(2), jnp.int32(2), "2"):
        with pytest.raises(TypeError, match=r"^topk_softmax: k must be"):
            topk_softmax(jnp.ones((1, 4)), k)
