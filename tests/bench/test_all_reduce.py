"""The benches of sums over ranks, on a CPU: what they count as wrong, and a decode step by packets where there are none."""

import tempfile
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bench import all_reduce, all_reduce_jax, decode_jax
from bench.model_jax import mesh_of
from moekit.errors import UnavailableError
from moekit.models.qwen3next import TINY


def test_wrong_sums_are_counted_in_jax(monkeypatch):
    """None of the right ones, late or not; all of those that XLA adds up in bfloat16."""
    right = all_reduce_jax.check(2, 3, 32, "bfloat16", 2, 2000)
    assert [(row["side"], row["calls"], row["wrong"]) for row in right] == [("in a row", 2000, 0), ("late", 20, 0)]
    real = all_reduce_jax.joined
    monkeypatch.setattr(all_reduce_jax, "joined", lambda side, *of: real("psum", *of))
    assert all_reduce_jax.check(2, 3, 32, "bfloat16", 1, 4)[0]["wrong"] == 4


def test_wrong_sums_are_counted_in_torch(monkeypatch):
    """One of each chain's calls."""

    def counted() -> list[int]:
        with tempfile.TemporaryDirectory() as folder:
            rows = all_reduce.on_rank(0, 1, f"{folder}/ranks", 3, 32, "bfloat16", ((), 3, 1, 300), True)
            torch.distributed.destroy_process_group()
        return [row["wrong"] for row in rows]

    assert counted() == [0, 0]
    real, calls = all_reduce.mt.all_reduce_add_rms_norm, []

    def spoiled(partial, *of, **given):
        calls.append(1)
        return real(partial + (len(calls) % 3 == 0), *of, **given)

    monkeypatch.setattr(all_reduce.mt, "all_reduce_add_rms_norm", spoiled)
    assert counted() == [100, 1]


def test_the_order_of_ranks_matters():
    """What sums are held to is NumPy's, in float32, rounded once."""
    parts = np.random.default_rng(0).standard_normal((3, 40, 32)).astype(jnp.bfloat16)
    residual, wide = parts[0] * 3, parts.astype(np.float32)
    wanted = (((wide[0] + wide[1]) + wide[2]) + residual.astype(np.float32)).astype(jnp.bfloat16)
    found = all_reduce.in_order(*(torch.tensor(x.astype(np.float32)).bfloat16() for x in (parts, residual)))
    np.testing.assert_array_equal(all_reduce_jax.in_order(parts, residual), wanted)
    np.testing.assert_array_equal(found.float().numpy(), wanted.astype(np.float32))


def test_a_step_by_packets_says_why_not():
    """No device of a CPU can have a channel."""
    with pytest.raises(UnavailableError, match=r"no packets: psum: channel: .* is no GPU"):
        decode_jax.steps_of(SimpleNamespace(mesh=mesh_of(2), config=TINY), "float32", 2, "pallas with packets")


def test_steps_by_packets_go_on_with_the_link(monkeypatch):
    """Each has the link of the one before."""

    class Held:
        lock, link = threading.RLock(), jnp.zeros(2, jnp.int32)

        def keep(self, link):
            self.link = link

    def step(model, tokens, cache, *, kernels, link):
        return tokens + link[0], cache, link + 1

    monkeypatch.setattr(decode_jax, "greedy_step", step)
    channel = Held()
    steps = decode_jax.Steps(jnp.ones(1), jnp.zeros(3, jnp.int32), {}, "pallas", channel=channel)
    assert [int(steps()[0]) for _ in range(4)] == [0, 1, 3, 6]
    assert [*channel.link] == [4, 4]
    assert steps.arguments == len(jax.tree.leaves((steps.model, steps.tokens, channel.link)))
