"""bench/engine_jax.py: every sequence gets its tokens, and the rates are those of the run."""

import jax
import numpy as np
from jax.sharding import Mesh

from bench import engine_jax
from bench.model_jax import random_model
from moekit.models.qwen3next import TINY


def test_an_engine_serves_all_its_sequences(monkeypatch):
    monkeypatch.setattr(engine_jax, "ROOM", 64)
    monkeypatch.setattr(engine_jax, "PIECE", 16)
    monkeypatch.setattr(engine_jax, "PROMPTS", (4, 40))
    monkeypatch.setattr(engine_jax, "NEW", (5, 12))
    model = random_model(TINY, Mesh(np.array(jax.devices()[:1]), ("tp",)), "float32")
    row = engine_jax.served(model, 2, np.random.default_rng(0), "xla")
    assert row["sequences"] == 8
    assert 8 * 5 <= row["tokens"] < 8 * 12
    assert row["steps alone tokens/s"] > 0 < row["tokens/s"]
