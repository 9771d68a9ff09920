"""The JAX face: outputs that share a base, derivatives of derivatives."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moekit.lang as ml
from moekit.compile.schedule import Schedule
from moekit.errors import ScheduleError, ShapeError
from moekit.jax import add_rms_norm, face, gated_rms_norm, launch, op, program, silu_and_mul, topk_softmax, view
from moekit.lang import In, fusion
from moekit.testing.probes import PROBES


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


@pytest.fixture
def traces(monkeypatch):
    """How often kernels are traced, from an empty cache."""
    count, original = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda *args, **more: (count.append(1), original(*args, **more))[1])
    program.launched.cache_clear()
    yield count
    program.launched.cache_clear()


def test_eager_calls_of_one_signature_are_traced_once(traces):
    """Other values, arrays and derivatives need no new trace; other shapes, views, dtypes and parameters do."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 48)), jnp.float32)
    call = lambda a, **more: silu_and_mul(view(a)[:, 8:40], implementation="pallas", **more)  # noqa: E731
    for i in range(3):
        np.testing.assert_allclose(call(x + i), silu_and_mul((x + i)[:, 8:40], implementation="xla"), rtol=1e-5)
    assert len(traces) == 1
    silu_and_mul(view(x)[:, :32], implementation="pallas")
    assert len(traces) == 2
    call(x.astype(jnp.float16))
    assert len(traces) == 3
    for k, renormalize in ((3, True), (3, True), (3, False), (4, True)):
        topk_softmax(x, k, renormalize, implementation="pallas")
    assert len(traces) == 6


ONCE = """
import jax, jax.numpy as jnp
from moekit.jax import silu_and_mul
run = jax.jit(lambda x: silu_and_mul(x, implementation="pallas"))
for _ in range(2):
    run(jnp.ones((2, 8)))
print(run._cache_size())
"""


def test_the_first_call_of_a_process_is_compiled_once():
    """Nothing is loaded on the way that jit's caches hang on."""
    done = subprocess.run([sys.executable, "-c", ONCE], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr[-2000:]


def test_an_eager_call_is_the_compiled_one(traces):
    """The same function serves under jit (inlined: no call in the program), grad and vmap."""
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 4, 16)), jnp.float32)
    call = lambda a: silu_and_mul(a, implementation="pallas")  # noqa: E731
    np.testing.assert_array_equal(call(x[0]), jax.jit(call)(x[0]))
    assert "silu_and_mul" in str(jax.make_jaxpr(call)(x[0]))
    assert "func private @silu_and_mul" not in jax.jit(lambda a: call(call(a))).lower(x[0]).as_text()
    np.testing.assert_allclose(jax.vmap(call)(x)[1], call(x[1]), rtol=1e-6)
    grads = [jax.grad(lambda a, i=i: silu_and_mul(a, implementation=i).sum())(x[0]) for i in ("pallas", "xla")]
    np.testing.assert_allclose(*grads, rtol=1e-5)


def test_an_eager_call_sees_its_own_arrays(traces):
    """Nothing of one call's arrays stays for the next: in-place updates, Views to write to, gradients of both."""
    rng = np.random.default_rng(4)
    for _ in range(2):
        x, residual, base = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 16), (4, 16), (4, 40)))
        wanted = add_rms_norm(x, residual, jnp.ones(16), implementation="xla")
        out, total = add_rms_norm(x, residual, jnp.ones(16), implementation="pallas", out=(view(base)[:, 3:19], None))
        np.testing.assert_allclose(out[:, 3:19], wanted[0], rtol=1e-5)
        np.testing.assert_array_equal(out[:, 19:], base[:, 19:])
        np.testing.assert_allclose(total, wanted[1], rtol=1e-6)

        def loss(b, x=x, residual=residual):
            return add_rms_norm(x, residual, jnp.ones(16), implementation="pallas", out=(view(b)[:, 3:19], None))[0].sum()

        grad = jax.grad(loss)(base)
        assert (grad[:, 3:19] == 0).all()
        assert (grad[:, 19:] == 1).all()
    assert len(traces) == 1


@pytest.mark.parametrize("implementation", ["pallas", "xla", None])
def test_what_is_no_schedule(implementation):
    """Refused by every implementation alike, whether or not it looks at schedules."""
    x = jnp.ones((4, 16))
    for schedule, said in (("tile:T:1 whole:I:8", "schedule is str; it must be a Schedule"), (8, "schedule is int")):
        with pytest.raises(ScheduleError, match=f"^silu_and_mul: {said}"):
            silu_and_mul(x, implementation=implementation, schedule=schedule)
    with pytest.raises(ScheduleError, match=r"^silu_and_mul: the schedule must say once what is done with axis I"):
        silu_and_mul(x, implementation=implementation, schedule=Schedule.parse("tile:T:1 whole:H:16"))


def test_longer_than_a_kernel_counts():
    """Refused from shapes alone: an index past 2^31 would be negative."""
    half = jnp.float16
    with pytest.raises(ShapeError, match="axis T has 3000000000 elements; kernels count to 2146435072"):
        jax.eval_shape(silu_and_mul, jax.ShapeDtypeStruct((3 * 10**9, 16), half))
    far = lambda x: silu_and_mul(view(x)[-4:], implementation="pallas")  # noqa: E731
    with pytest.raises(ShapeError, match="the base has 3000000000 elements along one axis"):
        jax.eval_shape(far, jax.ShapeDtypeStruct((3 * 10**9, 16), half))


def test_a_campaign_counts_kernels_of_a_signature_seen_before():
    """Each compiled function of a campaign traces its kernels itself, so that its cases count."""
    from moekit.testing.batch import run_case
    from moekit.testing.case import FuzzCase
    from moekit.testing.executors import executor

    case = FuzzCase("silu_and_mul", {"T": 3, "I": 24}, {"gate_up": "float32"})
    for _ in range(2):
        verdict = run_case(executor("pallas"), case)
        assert verdict.launched
        assert not verdict.problems


@pytest.mark.parametrize("columns", [45, 300])
def test_a_maximum_passes_nan_on_in_xla(columns):
    """XLA on a CPU drops it from longer rows."""
    x = np.random.default_rng(0).standard_normal((5, 4, columns)).astype(np.float32)
    x[:, 1, 7] = np.nan

    @fusion(lambda x: {"out": x.max(-1)}, x=In("T A H"))
    def highest(x):
        """The largest of each row."""
        return ml.max(x, over="H")

    got = op(highest)(jnp.asarray(x), implementation="xla")
    assert np.array_equal(np.asarray(got), x.max(-1), equal_nan=True)


def test_rows_that_lie_across_memory_have_one_schedule(monkeypatch):
    """Of rows along memory many have programs twice as large; of heads across memory, or of every second element, not."""

    class Seen(Exception):
        pass

    def launched(static):
        raise Seen(static.schedule)

    monkeypatch.setattr(face, "launched", launched)
    x, weight = jnp.zeros((1100, 4, 256), jnp.bfloat16), jnp.zeros(128, jnp.bfloat16)
    across = view(jnp.zeros((1100, 128, 4), jnp.bfloat16)).transpose(0, 2, 1)
    for z, rows, warps in (
        (x[..., :128], 3, 4),
        (x[..., :128], 1100, 8),
        (across, 3, 4),
        (across, 1100, 4),
        (view(x)[..., ::2], 1100, 4),
    ):
        with pytest.raises(Seen) as seen:
            gated_rms_norm(z[:rows], z[:rows], weight, implementation="pallas")
        schedule = seen.value.args[0]
        assert schedule.launches[0].warps == warps


def test_a_zero_of_one_element_keeps_its_sign():
    """In programs of one element a constant is a scalar, which is traced."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    schedule = Schedule.parse("tile:T:1 tile:H:1 warps:1 stages:1")
    side, turned = op(PROBES["probe_signs"])(x, implementation="pallas", schedule=schedule)
    np.testing.assert_array_equal(side, np.where(np.asarray(x) > 0.5, np.inf, -np.inf))
    assert ((np.asarray(turned) == -np.inf) == (np.asarray(x) <= 0.5)).all()
