"""bench/decode_jax.py and what it shares with bench/prefill_jax.py, on a CPU."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from bench import decode_jax, model_jax
from bench.decode_jax import ROOM, begin, steps_of
from moekit.models.qwen3next import TINY
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.kernels import named

SMALL = replace(TINY, layer_types=(GDN, ATTENTION))


def mesh_of(tp=1):
    return Mesh(np.array(jax.devices()[:tp]), ("tp",))


def test_both_kinds_decode_the_same_tokens():
    """Three steps in float32, from random tokens and a random cache that is half full."""
    model = model_jax.random_model(SMALL, mesh_of(), "float32")
    tokens = {}
    for kind, steps in steps_of(model, "float32", 2):
        tokens[kind] = [np.asarray(steps()) for _ in range(3)]
        assert (steps.cache.lengths == ROOM // 2 + 3).all()
    assert np.shape(tokens["xla"]) == (3, 2)
    np.testing.assert_array_equal(tokens["pallas"], tokens["xla"])
    assert len(np.unique(tokens["xla"])) > 1


def test_without_collectives_nothing_is_summed_over_ranks():
    model = model_jax.random_model(SMALL, mesh_of(2), "float32")
    kinds = ("pallas", "pallas without collectives")
    texts = {kind: steps.program.as_text() for kind, steps in steps_of(model, "float32", 2, kinds)}
    assert texts[kinds[0]].count(" all-reduce(") == 2 * len(SMALL.layer_types)
    assert " all-reduce(" not in texts[kinds[1]]


def test_what_is_drawn_is_random_everywhere():
    """No weight, key or state is zero; the same numbers every time, in each kind's own arrays."""
    caches = [begin(SMALL, mesh_of(), "bfloat16", 2, named(kind))[1] for kind in ("pallas", "xla")]
    caches[0] = caches[0].apart()
    for x, y in zip(*(jax.tree.leaves((c.deltas, c.attentions)) for c in caches), strict=True):
        assert (x != 0).mean() > 0.9
        np.testing.assert_array_equal(x, y)
    for array in jax.tree.leaves(model_jax.random_model(SMALL, mesh_of(2), "float32").params):
        assert (array != 0).mean() > 0.9


@pytest.mark.parametrize("tp", [1, 2])
def test_the_weights_of_a_step_are_those_of_the_model(tp):
    """With all experts chosen and one sequence, what a step must move of weights is what a device holds, but the embedding."""
    config = replace(SMALL, num_experts_per_tok=SMALL.num_experts)
    model = model_jax.random_model(config, mesh_of(tp), "float32")
    found = model_jax.moved(config, tp, 1, 1, 0, "float32")
    weights = sum(n for part, n in found.items() if part not in ("states", "keys and values"))
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(model.params))
    held -= model.params["embed_tokens"].nbytes
    assert weights == pytest.approx(held, rel=0.08)  # norms, convolutions and what makes layers alike are left out


def test_a_command_line_is_measured(monkeypatch, tmp_path):
    """All of the bench but the profiler, which sees no kernels on a CPU."""
    monkeypatch.setattr(decode_jax, "profile", lambda call, calls: {"kernel": [2.0, 3.0]})
    monkeypatch.setattr(decode_jax, "configuration", lambda layers, vocabulary: SMALL)
    monkeypatch.setattr(decode_jax, "copy_rate", lambda: 1.0)
    rows = decode_jax.measured(2, "512", 2, "float32", (1, 2), ("pallas", "xla"), 2)
    assert [(row["T"], row["side"], row["same tokens"]) for row in rows] == [
        (1, "pallas", 1.0), (1, "xla", 1.0), (2, "pallas", 1.0), (2, "xla", 1.0),
    ]  # fmt: skip
    assert all(row["ms"] > 0 < row["dispatch ms"] and row["arguments"] > 10 for row in rows)
