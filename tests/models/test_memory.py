"""The estimate of temporaries against what XLA says that its programs take: prefill, pieces of a prompt, steps."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from moekit.models.qwen3next import TINY, FitError, Room, abstract_model, cache_shapes, extend, greedy_step, memory, prefill
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.memory import cache_bytes, temporaries

CONFIG = replace(TINY, layer_types=(GDN, ATTENTION), vocab_size=256)


@pytest.fixture(scope="module")
def model(mesh):
    return abstract_model(CONFIG, mesh(1), "float32")


def taken(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def rows(model, batch, length):
    return cache_shapes(CONFIG, model.mesh, batch, length, np.float32, stacked=False)


def of(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


@pytest.mark.parametrize(("piece", "length"), [(64, 4096), (256, 16384)])
def test_a_piece_behind_a_long_cache(model, piece, length):
    held = taken(extend.lower(model, of(1, piece), of(1), rows(model, 1, length), kernels="xla").compile())
    assert held <= temporaries(CONFIG, 1, "float32", Room(1, length, piece=piece)) <= 4 * held


def test_a_prompt_takes_what_its_tokens_take_and_no_scores_of_all_of_it(mesh):
    """Twice the prompt, twice the memory and not four times: an attention layer with as many experts as are sorted."""
    config = replace(CONFIG, layer_types=(ATTENTION,), num_experts=24)
    model, held = abstract_model(config, mesh(1), "float32"), []
    for length in (4096, 8192):
        held.append(taken(prefill.lower(model, of(1, length), of(1), cache_length=length, kernels="xla").compile()))
        assert held[-1] <= temporaries(config, 1, "float32", Room(1, length, prompt=length)) <= 4 * held[-1]
    assert held[1] <= 2.2 * held[0]


@pytest.mark.parametrize(("batch", "length"), [(16, 16384), (1, 32768)])
def test_a_step_over_long_caches(model, batch, length):
    held = taken(greedy_step.lower(model, of(batch), rows(model, batch, length), kernels="xla").compile())
    assert held <= temporaries(CONFIG, 1, "float32", Room(batch, length)) <= 4 * held


def test_an_engine_fits_with_what_its_steps_take_or_not_at_all(model, monkeypatch):
    room = cache_bytes(CONFIG, 1, "float32", Room(17, 4096)) + temporaries(CONFIG, 1, "float32", Room(16, 4096, piece=256))
    monkeypatch.setattr(memory, "free_bytes", lambda devices: room)
    memory.check_rows_fit(CONFIG, model.mesh, "float32", slots=16, length=4096, piece=256)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: room - 1)
    with pytest.raises(FitError, match=r"engine: 16 \+ 1 rows of 4096 tokens take 0.04 GB .* steps about 0.04 GB more"):
        memory.check_rows_fit(CONFIG, model.mesh, "float32", slots=16, length=4096, piece=256)
