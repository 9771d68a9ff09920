"""all_reduce_add_rms_norm: one rank in every implementation, several ranks in those that play or have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moekit.backends.array import evaluate, evaluate_ranks
from moekit.errors import DeclarationError, DtypeError, ShapeError, UnavailableError
from moekit.fusions import FUSIONS
from moekit.jax import all_reduce_add_rms_norm
from moekit.lang import In, InOut, all_reduce, cast, f32, fusion, mean, rsqrt, sum
from moekit.lang.dtypes import FLOATS, MANTISSA, numpy_dtype
from moekit.testing import Call, check, implementations
from moekit.testing import operands as drawn
from moekit.testing.bounds import bounds

FUSION = FUSIONS["all_reduce_add_rms_norm"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_of_one_rank_it_is_add_rms_norm(dtype):
    """The same graph, whose suite then holds for both."""
    alone, given = bind(operands(1, 3, 50, dtype), 1)[0], {"x": (3, 50), "residual": (3, 50), "weight": (50,)}
    other = FUSIONS["add_rms_norm"]
    plain = other.trace(other.bind(given, dict.fromkeys(given, dtype), other.bind_params({})))
    assert repr(alone.nodes).replace("'partial'", "'x'") == repr(plain.nodes)
    assert not alone.ranks


@pytest.mark.parametrize("implementation", implementations())
def test_one_rank(implementation):
    """Every implementation serves it."""
    check(implementation, Call(FUSION, drawn(FUSION, {"T": 3, "H": 50}, "float16")))


@fusion(lambda parts, residual, weight: {}, parts=In("R T H"), residual=InOut("T H"), weight=In("H"))
def at_once(parts, residual, weight):
    """What several ranks make, of all their parts: for its bound."""
    total = cast(sum(f32(parts), over="R") + f32(residual), residual.dtype)
    t = f32(total)
    out = t * rsqrt(mean(t * t, over="H") + 1e-6) * (f32(weight) + 1.0)
    return {"out": cast(out, parts.dtype), "residual": total}


def operands(ranks: int, rows: int, width: int, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Parts of every rank, and what is the same on all."""
    rng = np.random.default_rng([seed, ranks, rows, width])
    shapes = {"partial": (ranks, rows, width), "residual": (rows, width), "weight": (width,)}
    return {n: rng.standard_normal(s).astype(numpy_dtype(dtype)) for n, s in shapes.items()}


def own(values: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """One rank's operands."""
    return {n: np.array(x[rank] if n == "partial" else x) for n, x in values.items()}


def bind(values: dict[str, np.ndarray], ranks: int):
    """The graph of one rank of several, and its sizes."""
    mine = own(values, 0)
    shapes, dtypes = {n: x.shape for n, x in mine.items()}, {n: x.dtype.name for n, x in mine.items()}
    binding = FUSION.bind(shapes, dtypes, FUSION.bind_params({"tp": ranks}))
    return FUSION.trace(binding), dict(binding.sizes)


def hold(values: dict[str, np.ndarray], ranks: int, outputs: dict[str, np.ndarray]) -> None:
    """Outputs of one rank are within the bound of the reference, and the residual is the sum in rank order to the bit."""
    expected = FUSION.reference(**values if ranks > 1 else own(values, 0), eps=1e-6, offset=1.0, tp=ranks)
    known = bounds(at_once, {"parts": values["partial"], "residual": values["residual"], "weight": values["weight"]})
    for n, x in outputs.items():
        got = np.asarray(x).astype(np.float64)
        half = np.spacing(np.abs(expected[n]).astype(np.float32)) * 2.0 ** (23 - MANTISSA[x.dtype.name])
        assert (np.abs(got - expected[n]) <= half + known[n].error(4.0)).all(), n
    total = values["partial"][0].astype(np.float32)
    for part in values["partial"][1:]:
        total = total + part.astype(np.float32)
    total = (total + values["residual"].astype(np.float32)).astype(values["residual"].dtype)
    np.testing.assert_array_equal(np.asarray(outputs["residual"]), total)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_array_evaluation_of_all_ranks(ranks, dtype):
    """Every rank has the same bits, which are the sum in rank order."""
    values = operands(ranks, 4, 50, dtype)
    graph, sizes = bind(values, ranks)
    outputs = evaluate_ranks(graph, [own(values, r) for r in range(ranks)], sizes)
    for each in outputs:
        hold(values, ranks, each)
        assert all((each[n].tobytes() == x.tobytes()) for n, x in outputs[0].items())


def on_mesh(ranks: int, values: dict[str, np.ndarray], implementation: str, said: int | None = None):
    """The outputs of every rank of virtual CPU devices."""
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",))

    def body(partial, residual, weight):
        outs = all_reduce_add_rms_norm(partial[0], residual, weight, tp=said or ranks, implementation=implementation)
        return tuple(x[None] for x in outs)

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P("tp"), check_vma=False))
    out, residual = run(*map(jnp.asarray, values.values()))
    return [{"out": np.asarray(out[r]), "residual": np.asarray(residual[r])} for r in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_virtual_devices(ranks, dtype):
    """XLA gathers and adds up in rank order."""
    values = operands(ranks, 3, 40, dtype)
    for each in on_mesh(ranks, values, "xla"):
        hold(values, ranks, each)


def test_sum_by_psum_is_within_the_bound():
    """The named fallback, of two ranks, whose sum has one order."""
    values = operands(2, 3, 40, "bfloat16")
    for each in on_mesh(2, values, "psum"):
        hold(values, 2, each)


def test_wrong_meshes_are_refused():
    """Another number of ranks than the mesh has, no mesh at all, an implementation for what adds up over none."""
    values = operands(2, 3, 40, "float32")
    with pytest.raises(ShapeError, match="mesh axis 'tp' has 2 ranks, the call says tp=4; pass tp=2"):
        on_mesh(2, values, "xla", said=4)
    mine = [jnp.asarray(x) for x in own(values, 0).values()]
    with pytest.raises(UnavailableError, match=r"there is no mesh axis 'tp' here; call it inside jax\.shard_map"):
        all_reduce_add_rms_norm(*mine, tp=2, implementation="xla")
    graph, sizes = bind(values, 2)
    with pytest.raises(UnavailableError, match="one process of numpy is one rank of 2"):
        evaluate(graph, own(values, 0), sizes, "numpy")
    with pytest.raises(UnavailableError, match="it adds up over 2 ranks, but there are operands of 3"):
        evaluate_ranks(graph, [own(values, 0)] * 3, sizes)


def _reduces(over: str, of=lambda x: x, mesh: str = "tp", ranks: int = 2):
    def declared(x, tp: int = ranks):
        return all_reduce(of(x), over=over)

    made = fusion(mesh=mesh, x=In("T H", dtype=("float32", "int32")))(declared)
    return lambda dtype="float32": made.trace(made.bind({"x": (2, 3)}, {"x": dtype}, {"tp": ranks}))


def test_what_cannot_be_declared_is_refused():
    """In one sentence, when it is traced."""
    with pytest.raises(DeclarationError, match=r"all_reduce over 'H', which is an axis of arrays; sum\(x, over='H'\)"):
        _reduces("H")()
    with pytest.raises(DeclarationError, match="all_reduce over 'dp', which is no mesh axis"):
        _reduces("dp")()
    with pytest.raises(DtypeError, match="all_reduce adds up floats, got int32"):
        _reduces("tp")("int32")
    with pytest.raises(DeclarationError, match="all_reduce of one number"):
        _reduces("tp", lambda x: sum(x, over="T H"))()
    with pytest.raises(ShapeError, match="mesh axis tp has 0 ranks; it must have 1 to 64"):
        _reduces("tp", ranks=0)()
    with pytest.raises(DeclarationError, match="nothing says how many ranks mesh axis 'pp' has; add pp: int = 1"):
        _reduces("pp", mesh="pp")
    with pytest.raises(DeclarationError, match="'T' is an axis of operands and of the mesh"):

        @fusion(mesh="T", x=In("T H"))
        def clashing(x, T: int = 1):
            return x
