"""bench/decode_jax.py on a CPU: both kinds of kernels take the same steps, each from a cache of its own."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from bench.decode_jax import ROOM, begin, both
from moekit.models.qwen3next import TINY
from moekit.models.qwen3next.config import ATTENTION, GDN


def test_both_kinds_decode_the_same_tokens():
    """Three steps in float32, from random tokens and a random cache that is half full."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    for batch, steps in both(replace(TINY, layer_types=(GDN, ATTENTION)), mesh, "float32", (2,)):
        tokens = {kind: [np.asarray(step()) for _ in range(3)] for kind, step in steps.items()}
        assert np.shape(tokens["xla"]) == (3, batch)
        np.testing.assert_array_equal(tokens["pallas"], tokens["xla"])
        assert (steps["pallas"].cache.lengths == ROOM // 2 + 3).all()
        assert len(np.unique(tokens["xla"])) > 1


def test_what_is_drawn_is_random_everywhere():
    """No weight, key or state is zero; the same numbers every time."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    caches = [begin(TINY, mesh, "bfloat16", 2)[1] for _ in range(2)]
    for x, y in zip(*(jax.tree.leaves(c.layers) for c in caches), strict=True):
        assert (x != 0).mean() > 0.9
        np.testing.assert_array_equal(x, y)
