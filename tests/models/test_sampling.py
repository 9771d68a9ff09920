"""How tokens are drawn: by the distribution of transformers' own processors, and what no sampling can be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moekit.errors import ArgumentError
from moekit.models.qwen3next import Sampling
from moekit.models.qwen3next.sampling import GREEDY, Draws, draw


def kept_by_hand(logits, how):
    """Probabilities after temperature, the k likeliest and the fewest that reach p, by sorting, in float64."""
    scaled = logits.astype(np.float64) / how.temperature
    order = np.argsort(-scaled, kind="stable")[: how.top_k or None]
    shares = np.exp(scaled[order] - scaled[order].max())
    shares /= shares.sum()
    reach = np.searchsorted(np.cumsum(shares), how.top_p) + 1
    found = np.zeros(len(logits))
    found[order[:reach]] = shares[:reach] / shares[:reach].sum()
    return found


def kept_by_transformers(logits, how):
    """Probabilities after transformers' own processors, in the order that its `generate` has them in."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    if how.top_k:
        chain.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        chain.append(TopPLogitsWarper(how.top_p))
    left = chain(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits[None]))
    return torch.softmax(left, dim=-1)[0].double().numpy()


run = jax.jit(draw)
COUNT, SIZE = 100_000, 24


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6), Sampling(0.8, 9, 0.9)])
def test_draws_have_the_distribution_that_is_asked_for(how):
    """Chi-square on 100,000 draws: of as many seeds, and of one seed's tokens one after the other."""
    logits = np.random.default_rng(0).normal(size=SIZE).astype(np.float32) * 2
    wanted = kept_by_transformers(logits, how)
    np.testing.assert_allclose(kept_by_hand(logits, how), wanted, atol=1e-6)
    rows, many, every = jnp.broadcast_to(logits, (COUNT, SIZE)), Draws.of([how] * COUNT), np.arange(COUNT)
    for draws in (replace(many, seed=every.astype(np.uint32)), replace(many, made=every.astype(np.int32))):
        seen = np.bincount(np.asarray(run(rows, draws)), minlength=SIZE)
        assert seen[wanted == 0].sum() == 0
        shares = wanted[wanted > 0] / wanted[wanted > 0].sum()
        assert chisquare(seen[wanted > 0], shares * COUNT).pvalue > 1e-4


def test_greedy_rows_beside_drawn_ones_and_rows_of_nan():
    logits = np.random.default_rng(1).normal(size=(4, SIZE)).astype(np.float32)
    logits[2, 7] = np.nan
    logits[3, 7] = np.inf
    tokens = run(logits, Draws.of([GREEDY, Sampling(2.0), Sampling(1.0), GREEDY]))
    assert tokens[0] == logits[0].argmax()
    assert 0 <= tokens[1] < SIZE
    assert tokens[2:].tolist() == [-1, -1]


def test_what_is_next_to_nothing_takes_the_likeliest():
    hows = [Sampling(1.5e-38), Sampling(1e-300), Sampling(1.0, top_p=1e-44), Sampling(1.0, top_p=1e-300)]
    logits = np.random.default_rng(2).permutation(np.arange(SIZE, dtype=np.float32))
    assert run(np.stack([logits] * 4), Draws.of(hows)).tolist() == [logits.argmax()] * 4


WRONG = [{"temperature": value} for value in (-1.0, np.nan, np.inf, 1e39, 10**400, "hot", None, True)]
WRONG += [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"seed": 2**32}, {"seed": 1.5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_sampling_refuses(wrong):
    with pytest.raises(ArgumentError, match=f"sampling: {next(iter(wrong))} is "):
        Sampling(**wrong)
