"""Prompts that are read in pieces: the logits and memories of those that are read whole."""

import jax
import numpy as np
import pytest
import torch

from moekit.errors import ArgumentError, DtypeError, ShapeError
from moekit.models.qwen3next import attention, empty_cache, extend, gdn, prefill

CASE = "two-layers"


def test_pieces_around_a_chunk_give_the_logits_of_transformers(zoo, monkeypatch):
    """One token more or less than a chunk of the delta rule, each piece continuing the cache of those before it.

    Two rows are read together, in pieces that end at different places; what is held at a time is less than a piece.
    """
    monkeypatch.setattr(attention, "BLOCK", 48)
    monkeypatch.setattr(gdn, "AT_ONCE", 128)
    tokens = np.random.default_rng(6).integers(0, 256, (2, 200))
    with torch.no_grad():
        wanted = zoo.transformers(CASE)(torch.tensor(tokens)).logits.numpy()
    places = np.array([[63, 64, 65, 127, 200], [64, 127, 128, 129, 193]])
    cache, read = empty_cache(zoo.model(CASE), 2, 201, "xla"), np.zeros(2, int)  # no other test's shape: traced anew
    for ends in places.T:
        piece = np.zeros((2, 80), np.int32)
        for row, start, end in zip(range(2), read, ends, strict=True):
            piece[row, : end - start] = tokens[row, start:end]
        logits, cache = extend(zoo.model(CASE), piece, (ends - read).astype(np.int32), cache, kernels="xla")
        theirs = wanted[np.arange(2), ends - 1]
        assert np.abs(logits - theirs).max() <= 1e-4 * np.abs(theirs).max(), ends
        read = ends


def test_pieces_at_a_time_give_the_logits_of_a_whole_prompt(zoo):
    """Of several sequences of unequal lengths, over two ranks."""
    model, rng = zoo.model(CASE, tp=2), np.random.default_rng(4)
    tokens, lengths = rng.integers(0, 256, (2, 96)).astype(np.int32), np.array([90, 33], np.int32)
    wanted, whole = prefill(model, tokens, lengths, cache_length=128, kernels="xla")
    cache, read = empty_cache(model, 2, 128, "xla"), np.zeros(2, np.int32)
    for counts in ([32, 1], [26, 31], [32, 1]):
        piece = np.stack([np.pad(row[at : at + n], (0, 32 - n)) for row, at, n in zip(tokens, read, counts, strict=True)])
        logits, cache = extend(model, piece, np.array(counts, np.int32), cache, kernels="xla")
        read = read + counts
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    assert cache.lengths.tolist() == lengths.tolist()
    for mine, theirs in zip(jax.tree.leaves(cache.deltas), jax.tree.leaves(whole.deltas), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    for mine, theirs in zip(jax.tree.leaves(cache.attentions), jax.tree.leaves(whole.attentions), strict=True):
        np.testing.assert_allclose(mine[:, :, :33], theirs[:, :, :33], atol=2e-4)
    with pytest.raises(ShapeError, match="one row each is needed"):
        extend(model, piece[:1], np.array([1], np.int32), cache, kernels="xla")
    full, cache = extend(model, piece, np.array([1, 32], np.int32), cache, kernels="xla")
    assert np.isfinite(full).all()
    full, cache = extend(model, piece, np.array([32, 32], np.int32), cache, kernels="xla")
    full, cache = extend(model, piece, np.array([32, 31], np.int32), cache, kernels="xla")
    assert np.isnan(full).all(axis=1).tolist() == [True, False]
    assert cache.lengths.tolist() == [-1, 128]


@pytest.mark.parametrize(
    ("tokens", "lengths", "error", "words"),
    [
        (np.array(5), [1], ShapeError, r"extend: tokens has shape \(\) where \[B, S\] is needed"),
        ([[5]], [1], DtypeError, "extend: tokens is a list; an integer array"),
        (np.array([[5, 256]]), [2], ArgumentError, r"extend: tokens\[0, 1\] is 256, outside the vocabulary of 256"),
        (np.array([[5, 6]]), [3], ArgumentError, r"extend: lengths\[0\] is 3; between 1 and 2 are real in a row"),
    ],
)
def test_what_is_refused_names_the_function(zoo, tokens, lengths, error, words):
    model = zoo.model(CASE)
    cache = empty_cache(model, 1, 32, "xla")
    with pytest.raises(error, match=words):
        extend(model, tokens, np.array(lengths, np.int32), cache, kernels="xla")
    with pytest.raises(ArgumentError, match="extend: cache is a tuple; what prefill or a step returned is needed"):
        extend(model, np.array([[5]]), np.array([1]), (), kernels="xla")
