"""On two GPUs, `python -m pytest -m gpu tests/jax/test_channel_gpu.py`: packets, in a process that a hang cannot outlive."""

import time

import numpy as np
import pytest

from bench.child import Child
from moekit.cli.platform import gpu_count

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() < 2, reason="needs two GPUs")]
RANKS, WIDTH, PATIENCE = 2, 2048, 240


def opened(looks: int = 2**24):
    """A channel between the first GPUs, and a function of its link: what one call by it makes."""
    import jax
    from jax.sharding import PartitionSpec as P

    from bench.all_reduce_jax import Ranked, mesh_of
    from moekit.jax import Channel, all_reduce_add_rms_norm, exchange, view

    mesh = mesh_of(RANKS)
    channel = Channel(mesh, width=WIDTH, looks=looks)

    def one(x, residual, weight, link):
        x = view(x)[0][:, : 2 * residual.shape[-1] : 2] if x.shape[-1] > residual.shape[-1] else x[0]
        given = {"tp": RANKS, "implementation": "pallas"}
        (out, total), link = exchange(all_reduce_add_rms_norm, link, x, residual, weight, **given)
        return out[None], total[None], link

    assert jax.default_backend() == "gpu"
    return channel, Ranked(one, mesh, (P("tp"), P(), P()), (P("tp"), P("tp")), channel)


def sums(call, rows: int, dtype: str, width: int, seed: int, own: int = WIDTH) -> bool:
    """Whether the residual is the float32 sum in the order of ranks, and what is normalised near float64's, on all ranks: of
    `own` elements of each row, of which there are `width`, every second one where these are more."""
    import jax.numpy as jnp

    from moekit.fusions import FUSIONS

    rng, kind = np.random.default_rng([seed, rows]), jnp.dtype(dtype)
    shapes = (RANKS, rows, width), (rows, own), (own,)
    x, residual, weight = (rng.standard_normal(shape).astype(kind) for shape in shapes)
    out, total = map(np.asarray, call(x, residual, weight))
    used = x[:, :, : 2 * own : 2] if width > own else x
    wanted = used[0].astype(np.float32)
    for part in used[1:]:
        wanted = wanted + part.astype(np.float32)
    wanted = (wanted + residual.astype(np.float32)).astype(kind)
    near = FUSIONS["all_reduce_add_rms_norm"].reference(used, residual, weight, eps=1e-6, offset=1.0, tp=RANKS)["out"]
    close = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    same = all((total[r] == wanted).all() and (out[r] == out[0]).all() for r in range(RANKS))
    return same and np.allclose(out[0].astype(np.float64), near, rtol=close, atol=close)


def right(dtype: str) -> list[dict]:
    """Calls of several numbers of rows, dense and of every second column of wider rows."""
    channel, call = opened()
    found = []
    for rows in (1, 3, 128, 2, 64, 1):
        for width in (WIDTH, 2 * WIDTH + 6):
            fine = all(sums(call, rows, dtype, width, seed) for seed in range(5))
            found.append({"side": dtype, "rows": rows, "width": width, "right": fine})
    channel.check()
    return found


def uneven() -> list[dict]:
    """Rows that no access divides, and rows too short for one of several elements."""
    channel, call = opened()
    found = []
    for dtype in ("bfloat16", "float32", "float16"):
        for own, width in ((257, 257), (257, 520), (3, 3)):
            fine = all(sums(call, 5, dtype, width, seed, own) for seed in range(4))
            found.append({"side": dtype, "rows": own, "width": width, "right": fine})
    channel.check()
    return found


def missed() -> list[dict]:
    """The last rank's packets bear other numbers, which is as good as none: who is named, how soon, and what comes next."""
    from dataclasses import replace

    from moekit.errors import RankError

    channel, call = opened(looks=2**20)
    before = sums(call, 2, "float32", WIDTH, 0)
    channel.check()
    epochs = channel.link.epochs.reshape(RANKS, -1).at[-1].add(2).reshape(-1)
    channel.keep(replace(channel.link, epochs=epochs))
    begin, said = time.perf_counter(), ""
    sums(call, 2, "float32", WIDTH, 1)
    try:
        channel.check()
    except RankError as error:
        said = str(error)
    seconds = time.perf_counter() - begin
    return [{"side": said, "seconds": seconds, "right": before and sums(call, 2, "float32", WIDTH, 2)}]


def asked(run, monkeypatch, *of) -> list[dict]:
    """The rows of a function in a process of its own, which has what memory this one has left it."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    child = Child(run, PATIENCE)
    try:
        return child.rows(*of)
    finally:
        child.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_sums_are_right_to_the_bit(dtype, monkeypatch):
    """A channel opens, and every call by it is the sum in the order of ranks."""
    found = asked(right, monkeypatch, dtype)
    assert len(found) == 12, found
    assert all(row["right"] for row in found), found


def test_widths(monkeypatch):
    """Rows of 257 elements, side by side and not, and of 3."""
    found = asked(uneven, monkeypatch)
    assert len(found) == 9, found
    assert all(row["right"] for row in found), found


def test_a_rank_that_does_not_come(monkeypatch):
    """It is named in time, and the channel that was made anew works."""
    (found,) = asked(missed, monkeypatch)
    assert f"rank {RANKS - 1} did not come: rank 0 waited for packet" in found["side"], found
    assert found["seconds"] < 30
    assert found["right"]
