"""Which of its two ways `pallas` goes: by a table of measurements, for a GPU, a graph and layouts, and never by the tokens."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moekit.compile import tile as t
from moekit.compile.schedule import Schedule
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.jax import add_rms_norm, face, launch, silu_and_mul, view
from moekit.jax.face import Call
from moekit.tune import way as ways
from moekit.tune.table import graph_key
from moekit.tune.way import MOSAIC, TRITON, faster, in_rows

H200 = "NVIDIA H200"
WON = {"T": [1, 64], TRITON: [2.0, 3.0], MOSAIC: [2.1, 2.5]}
SLOWER = {"T": [1, 64], TRITON: [2.0, 3.0], MOSAIC: [1.0, 3.4]}


def call(*operands, fusion="silu_and_mul", out=None, schedule=None):
    """A call of a fusion."""
    declared = FUSIONS[fusion]
    return Call(declared, dict(zip(declared.tensors, operands, strict=True)), declared.bind_params({}), out, schedule)


def went(made: Call, implementation: str = "pallas") -> str:
    """By what a call goes."""
    return made._door(implementation, made._buffers()[1])


@pytest.fixture
def measured(monkeypatch):
    """An H200 here, with a table that has a row of silu_and_mul of 64 columns."""
    x = jnp.ones((3, 128))
    rows = {graph_key(call(x).graph): {"whole": WON, "columns": WON}}
    monkeypatch.setattr(ways, "table", lambda device: rows if device == H200 else {})
    monkeypatch.setattr(face, "gpu", lambda: H200)
    return rows


def test_a_row_is_won_clearly_and_lost_nowhere():
    assert faster(WON)
    assert not faster(SLOWER)
    assert not faster({TRITON: [2.0, 3.0], MOSAIC: [1.9, 2.95]})


def test_what_was_measured_decides(measured):
    """The graph's sizes and dtypes, at any number of tokens; both ways by name; a schedule is Triton's."""
    for tokens in (1, 3, 5000):
        assert went(call(jnp.ones((tokens, 128)))) == "mosaic"
    assert went(call(jnp.ones((3, 128), jnp.bfloat16))) == went(call(jnp.ones((3, 64)))) == "pallas"
    assert went(call(jnp.ones((3, 128)), schedule=Schedule.parse("tile:T:1 tile:I:64 warps:4 stages:1"))) == "pallas"
    for name, door in (("pallas-triton", "pallas"), ("mosaic", "mosaic"), ("triton", "triton")):
        assert went(call(jnp.ones((3, 128))), name) == door
    (row,) = measured.values()
    for changed in ({"whole": SLOWER}, {"columns": SLOWER}):
        before = dict(row)
        row.update(changed)
        assert went(call(jnp.ones((3, 128)))) == "pallas"
        row.update(before)
    del row["columns"]
    assert went(call(jnp.ones((3, 128)))) == "pallas"


def test_another_gpu_or_none_goes_by_triton(measured, monkeypatch):
    for device in ("NVIDIA H100", ""):
        monkeypatch.setattr(face, "gpu", lambda device=device: device)
        assert went(call(jnp.ones((3, 128)))) == "pallas"


def test_rows_of_larger_arrays_go_alike(measured):
    """Tokens of an array go as all of them do; columns at multiples of 16 bytes; what is strided along them goes by Triton."""
    base = jnp.ones((9, 200))
    stack = view(jnp.ones((4, 9, 128)))
    for some in (view(base)[:, 8:136], view(base)[2:5, :128], view(base)[::3, 4:132], stack[2], stack[jnp.int32(2)]):
        assert went(call(some)) == "mosaic"
    for some in (
        view(base)[:, 1:129],
        view(base.T)[:128].T,
        view(jnp.ones((9, 256)))[:, ::2],
        view(jnp.ones((9, 201)))[:, :128],
    ):
        assert went(call(some)) == "pallas"
    out = view(jnp.zeros((9, 65)))[:3, :64]
    assert went(call(jnp.ones((3, 128)), out=out)) == "pallas"
    assert went(call(jnp.ones((3, 128)), out=view(jnp.zeros((9, 68)))[:3, :64])) == "mosaic"


def test_tokens_of_any_array_are_as_aligned_as_all():
    """Even where its rows begin at no multiple of 16 bytes: the kind of a layout may not hang on which tokens there are."""
    fusion = FUSIONS["expert_down"]
    shapes = {"activated": (6, 3, 37), "down": (5, 37, 21), "ids": (6, 3), "weights": (6, 3)}
    graph = fusion.trace(fusion.bind(shapes, dict.fromkeys(shapes, "bfloat16") | {"ids": "int32"}, fusion.bind_params({})))

    def placed(first, step, count):
        for n, tensor in graph.tensors.items():
            base = shapes.get(n, (6, 21))
            by_token = tensor.dims[0].text == "T"
            starts, steps = [0] * len(base), [1] * len(base)
            starts[0], steps[0] = (first, step) if by_token else (0, 1)
            yield t.Viewed(n, base, tuple(range(len(base))), tuple(starts), tuple(steps)), tensor

    for some in ((0, 1, 6), (1, 1, 3), (5, 1, 1), (1, 2, 2)):
        assert in_rows(graph, placed(*some))


@pytest.mark.parametrize(("wide", "row"), [(130, False), (136, True)])
def test_which_tokens_of_an_array_there_are_decides_nothing(wide, row):
    """Rows of 128 float32 in wider ones: every other row may begin at a multiple of 16 bytes where the rows between do not."""
    x = jnp.ones((9, wide))
    for some in (slice(None), slice(0, 1), slice(1, 2), slice(0, 9, 2), slice(1, 9, 2)):
        made = call(view(x)[some, :128])
        placed = [(made._buffers()[1]["gate_up"], made.graph.tensors["gate_up"])]
        assert in_rows(made.graph, placed) == row


def test_a_row_has_the_same_bits_beside_others(measured):
    """What is chosen is run: the bits of rows alone are those of rows beside others."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 128)), jnp.float32)
    whole = silu_and_mul(x, implementation="pallas")
    np.testing.assert_array_equal(whole, silu_and_mul(x, implementation="mosaic"))
    for some in (slice(0, 1), slice(2, 6)):
        np.testing.assert_array_equal(whole[some], silu_and_mul(x[some], implementation="pallas"))


def test_what_is_not_printed_goes_by_triton(measured):
    """Whatever a table says of it; by name it is refused."""
    x, w = jnp.ones((2, 64), jnp.float32), jnp.ones((32, 64), jnp.float32)
    made = call(x, w, fusion="gate_gemm")
    measured[graph_key(made.graph)] = {"whole": WON, "columns": WON}
    assert went(made) == "pallas"
    with pytest.raises(UnavailableError):
        made.kernels("mosaic")


def test_another_jax_has_no_table(monkeypatch):
    monkeypatch.setattr(ways, "_jax", lambda: "99.0")
    ways.table.cache_clear()
    assert ways.table(H200) == {}
    ways.table.cache_clear()


def test_shipped_tables_hold():
    """Rows have as many times as numbers of tokens, of graphs that are a fusion's, and those that are won are printed."""
    for device, made in ways._shipped().items():
        assert device
        assert made["made with"]["jax"]
        for key, row in made["entries"].items():
            name, *said = key.split()
            assert name in FUSIONS
            assert {s.split(":")[0] for s in said if ":" in s} == {n for n, x in FUSIONS[name].tensors.items()}
            for times in row.values():
                assert len(times["T"]) == len(times[TRITON]) == len(times[MOSAIC])


def test_a_call_that_is_served_says_so(measured, monkeypatch):
    """The command's text and the doctor's sentence name what a table says."""
    from moekit.cli.show import _pallas

    monkeypatch.setattr(ways, "_shipped", lambda: {H200: {}})
    declared = FUSIONS["silu_and_mul"]
    bound = lambda columns: declared.bind({"gate_up": (3, columns)}, {"gate_up": "float32"}, {})  # noqa: E731
    assert _pallas(declared, bound(128), None).startswith(f"# on an {H200} pallas goes by Mosaic GPU here: --as mosaic\n# silu")
    assert _pallas(declared, bound(64), None).startswith("# silu_and_mul")
    assert ways.won(H200) == ["silu_and_mul"]
    assert ways.won("NVIDIA H100") == []


def test_mosaic_gpu_needs_no_triton_lowering_but_where_it_is_interpreted(monkeypatch):
    """Whose jax has dropped that is who Mosaic GPU is for; on a CPU a sentence says what is missing."""
    hidden = "import sys; sys.modules['jax.experimental.pallas.triton'] = None; import moekit.jax.mosaic"
    subprocess.run([sys.executable, "-c", hidden], check=True)
    monkeypatch.setattr(launch, "plt", None)
    with pytest.raises(UnavailableError, match=r"add_rms_norm: jax .* has no jax.experimental.pallas.triton, and on a CPU"):
        add_rms_norm(jnp.ones((2, 8)), jnp.ones((2, 8)), jnp.ones(8), implementation="mosaic")


def test_the_shipped_table_of_the_h200_has_what_won(monkeypatch):
    """A short convolution's step goes by Mosaic GPU there, at any number of tokens and in columns, too."""
    monkeypatch.setattr(face, "gpu", lambda: H200)
    assert ways.won(H200) == ["causal_conv1d_step"]
    for tokens in (1, 200):
        columns = view(jnp.ones((tokens, 2048), jnp.bfloat16))[:, 1024:]
        state = view(jnp.ones((tokens, 1024, 3), jnp.bfloat16))
        assert went(call(columns, state, jnp.ones((1024, 4)), fusion="causal_conv1d_step")) == "mosaic"
