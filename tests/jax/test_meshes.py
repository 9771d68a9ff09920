"""On several devices: `shard_map` with its check, and meshes whose axes are explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.jax import gate_projections, silu_and_mul, topk_softmax, view


def mesh_of(platform: str, kind=AxisType.Auto):
    """Two devices if there are two, along `dp`; `tp` is one."""
    devices = jax.devices(platform)[:2]
    return jax.make_mesh((len(devices), 1), ("dp", "tp"), axis_types=(kind, kind), devices=devices)


def rows_cut(call, also=()):
    """For every operand: its T over dp, the axes `also` over tp."""
    over = {"T": "dp", **dict.fromkeys(also, "tp")}
    return tuple(P(*(over.get(d.text) for d in spec.dims)) for spec in FUSIONS[call.name].tensors.values())


def narrow(arrays):
    return tuple(jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32) for a in arrays)


@pytest.mark.usefixtures("smooth")
def test_shard_map_with_its_check(call, platform):
    """Rows on each device, weights on all: values, gradients (summed for the weights) and tangents as on one device."""
    arrays = narrow(call.arrays)

    def every(implementation, **cut):
        whole = call.whole(implementation)
        whole = jax.shard_map(whole, **cut) if cut else whole
        face = lambda *x: whole(*call.placed(x))  # noqa: E731
        loss = lambda *x: sum((out**2).sum() for out in face(*x).values())  # noqa: E731
        run = lambda *x: (face(*x), jax.grad(loss, tuple(range(len(x))))(*x), jax.jvp(face, x, x)[1])  # noqa: E731
        return jax.jit(run)(*(arrays[i] for i in call.moving))

    cut = every("pallas", mesh=mesh_of(platform), in_specs=rows_cut(call), out_specs=P("dp"))
    for got, want in zip(*map(jax.tree.leaves, (cut, every("xla"))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("smooth")
def test_outputs_vary_where_array_evaluation_does(call):
    """Whichever operand alone differs from device to device, outputs that do not depend on it are the same on all."""
    mesh = mesh_of("cpu")
    x = tuple(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in call.floats)

    def types(implementation, cut):
        seen = {}

        def body(*x):
            x = [lax.pcast(a, "dp", to="varying") if i == cut else a for i, a in enumerate(x)]
            outs = call.face(implementation)(*x)
            seen.update({n: jax.typeof(out).manual_axis_type for n, out in outs.items()})
            return lax.pmax(sum(lax.pcast(out.sum(), "dp", to="varying") if not seen[n].varying else out.sum()
                                for n, out in outs.items()), "dp")  # fmt: skip

        jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P()), *x)
        return seen

    for cut in range(len(x)):
        assert types("pallas", cut) == types("xla", cut)


def test_weights_cut_and_tokens_on_all(call_named, platform):
    """Tensor parallel: what does not depend on the cut weight may leave as it is on every device."""
    call, mesh = call_named("gate_projections"), mesh_of(platform)
    x = [jnp.asarray(a, jnp.float32) for a in call.arrays]

    def run(implementation):
        return jax.jit(jax.shard_map(
            lambda *a: gate_projections(*a, implementation=implementation), mesh=mesh,
            in_specs=(P(), P("dp"), P(), P()), out_specs=(P(None, "dp"), P(), P()),
        ))(*x)  # fmt: skip

    for got, want in zip(run("pallas"), run("xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_views_and_in_place_under_the_check(platform):
    """A View of a base that varies, written to a base that does not."""
    mesh = mesh_of(platform)
    x, base = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 24)), jnp.float32) for i in range(2))
    base = base[: 4 // mesh.shape["dp"]]

    def write(implementation):
        def body(x, base):
            return silu_and_mul(view(x)[:, 4:20], implementation=implementation, out=view(base)[:, 2:10])

        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("dp"), P()), out_specs=P("dp")))(x, base)

    np.testing.assert_allclose(write("pallas"), write("xla"), rtol=1e-6)


def put(mesh, arrays, specs):
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(narrow(arrays), specs, strict=True)]


@pytest.mark.usefixtures("smooth")
def test_cut_over_an_explicit_mesh(call, platform):
    """Array evaluation keeps rows where they are, eagerly, under jit and in gradients; kernels say what they need."""
    mesh = mesh_of(platform, AxisType.Explicit)
    plain = narrow(call.arrays)
    wanted = jax.jit(call.whole("xla"))(*plain)
    cut = put(mesh, call.arrays, rows_cut(call, also=("H", "D")))
    for got in (call.whole("xla")(*cut), jax.jit(call.whole("xla"))(*cut)):
        for n, out in got.items():
            assert jax.typeof(out).sharding.spec[0] == "dp"
            np.testing.assert_allclose(out, wanted[n], rtol=1e-4, atol=1e-4)
    loss = lambda *a: sum(out.sum() for out in call.whole("xla")(*a).values())  # noqa: E731
    for i, grad in zip(call.moving, jax.jit(jax.grad(loss, call.moving))(*cut), strict=True):
        assert jax.typeof(grad).sharding.spec == jax.typeof(cut[i]).sharding.spec
    with pytest.raises(UnavailableError, match=rf"^{call.name}: its operands are cut over the explicit mesh axis '\w+' and"):
        jax.eval_shape(call.whole("pallas"), *cut)


def test_an_explicit_mesh_otherwise(call_named, platform):
    """Operands that lie whole on every device, and shard_map over cut ones, take kernels; the default serves cut ones too."""
    call, mesh = call_named("topk_softmax"), mesh_of(platform, AxisType.Explicit)
    wanted = topk_softmax(*narrow(call.arrays), 3, implementation="xla")
    with jax.set_mesh(mesh):
        (same,), (cut,) = (put(mesh, call.arrays, [spec]) for spec in (P(), P("dp")))
        inside = jax.shard_map(lambda a: topk_softmax(a, 3, implementation="pallas"), in_specs=P("dp"), out_specs=P("dp"))
        for got in (topk_softmax(same, 3, implementation="pallas"), inside(cut), jax.jit(inside)(cut), topk_softmax(cut, 3)):
            for mine, theirs in zip(got, wanted, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_views_of_what_is_cut(platform):
    """A part of a base that is cut along the part's own axis, and a base written to, which stays as it lies."""
    mesh = mesh_of(platform, AxisType.Explicit)
    x, base = np.random.default_rng(0).standard_normal((2, 4, 24)).astype(np.float32)
    mine, other = put(mesh, (x, base), (P(None, "dp"), P("dp")))
    wanted = silu_and_mul(jnp.asarray(x)[1:, 4:20], implementation="xla")
    np.testing.assert_allclose(silu_and_mul(view(mine)[1:, 4:20], implementation="xla"), wanted, rtol=1e-6)
    got = silu_and_mul(view(mine)[1:, 4:20], implementation="xla", out=view(other)[1:, 2:10])
    assert jax.typeof(got).sharding.spec == P("dp", None)
    np.testing.assert_allclose(np.asarray(got)[1:, 2:10], wanted, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(got)[:, 10:], base[:, 10:])
