"""bench/decode_jax.py and what it shares with prefill and engine, on a CPU; test_smoke.py measures a step."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from bench import decode_jax, model_jax
from bench.decode_jax import begin, steps_of
from bench.model_jax import mesh_of
from moekit.models.qwen3next import TINY, abstract_model
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.kernels import named

SMALL = replace(TINY, layer_types=(GDN, ATTENTION))


def test_without_collectives_nothing_is_summed_over_ranks(monkeypatch):
    """Told from the program that is to be compiled."""
    texts, model = [], abstract_model(replace(TINY, layer_types=(GDN,)), mesh_of(2), "float32")

    class Steps:
        def __init__(self, model, tokens, cache, kernels, donated=False, channel=None):
            step = jax.jit(lambda *given: decode_jax.greedy_step(*given, kernels=kernels))
            texts.append(step.lower(model, tokens, cache).as_text())

    monkeypatch.setattr(decode_jax, "Steps", Steps)
    for kind in ("xla", "xla without collectives"):
        steps_of(model, "float32", 2, kind)
    assert texts[0].count("all_reduce") >= 2
    assert "all_reduce" not in texts[1]


def test_what_is_drawn_is_random_everywhere():
    """No weight, key or state is zero; the same numbers every time, in each kind's own arrays."""
    caches = [begin(SMALL, mesh_of(1), "bfloat16", 2, named(kind))[1] for kind in ("pallas", "xla")]
    caches[0] = caches[0].apart()
    for x, y in zip(*(jax.tree.leaves((c.deltas, c.attentions)) for c in caches), strict=True):
        assert (x != 0).mean() > 0.9
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_weights_of_a_step_are_those_of_the_model(tp):
    """With all experts chosen and one sequence, what a step must move of weights is what a device holds, but the embedding."""
    config = replace(SMALL, num_experts_per_tok=SMALL.num_experts)
    params = abstract_model(config, mesh_of(tp), "float32").params
    found = model_jax.moved(config, tp, 1, 1, 0, "float32")
    weights = sum(n for part, n in found.items() if part not in ("states", "keys and values"))
    held = sum(4 * np.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(params))
    held -= 4 * np.prod(params["embed_tokens"].shape)
    assert weights == pytest.approx(held, rel=0.08)  # norms, convolutions and what makes layers alike are left out


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(ValueError, match="--tp 64: there are 8 devices; take fewer, or a machine with more"):
        mesh_of(64)
