"""Generation: batches of unequal prompts, ends of sequences, progress, and both kinds of kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moekit.errors import ArgumentError
from moekit.jax import Link
from moekit.models.qwen3next import decode_step, generate, greedy_step, most_likely, prefill
from moekit.models.qwen3next.exchanged import Gathered
from moekit.models.qwen3next.model import _most_likely

CASE = "two-layers"


PROMPTS = [[5, 250, 17], [9] * 7, list(range(16))]


def run(zoo, prompts, tp=1, **options):
    return generate(zoo.model(CASE, tp=tp), prompts, kernels="xla", **options)


def test_a_prompt_is_continued_the_same_alone_and_in_a_batch(zoo):
    together = run(zoo, PROMPTS, max_new_tokens=8).tokens
    alone = [run(zoo, [prompt], max_new_tokens=8).tokens[0] for prompt in PROMPTS]
    assert list(together) == alone


def test_a_sequence_ends_at_an_end_token_and_the_others_go_on(zoo):
    free = run(zoo, PROMPTS, max_new_tokens=12).tokens
    stop = free[1][3]
    ended = run(zoo, PROMPTS, max_new_tokens=12, eos=stop).tokens
    for whole, cut in zip(free, ended, strict=True):
        length = whole.index(stop) + 1 if stop in whole else len(whole)
        assert cut == whole[:length]
    assert run(zoo, PROMPTS[1:2], max_new_tokens=12, eos=[stop]).tokens == (free[1][: free[1].index(stop) + 1],)


def test_progress_and_times(zoo):
    seen = []
    made = run(zoo, PROMPTS, max_new_tokens=5, progress=seen.append)
    assert [(p.stage, p.step, p.total) for p in seen] == [("prefill", 1, 5)] + [("decode", n, 5) for n in range(2, 6)]
    assert np.array_equal(np.array([p.tokens for p in seen]).T, made.tokens)
    assert all(p.seconds > 0 for p in seen)
    assert made.steady_steps == 3
    assert made.steady_seconds == pytest.approx(sum(p.seconds for p in seen[2:]))
    assert made.steady_tokens_per_second == pytest.approx(3 * 3 / made.steady_seconds)
    assert made.first_step_seconds == seen[1].seconds
    single = run(zoo, [[1]], max_new_tokens=1)
    assert (single.first_step_seconds, single.steady_tokens_per_second) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 3, "prompts is empty"),
        ([[1], []], 3, "prompt 1 is empty"),
        ([[1, 256]], 3, "prompt 0 holds token 256, outside the vocabulary of 256"),
        ([[-1]], 3, "token -1"),
        ([[1]], 0, "max_new_tokens = 0"),
    ],
)
def test_bad_prompts_are_refused(zoo, prompts, new, words):
    with pytest.raises(ValueError, match=words):
        run(zoo, prompts, max_new_tokens=new)


def test_unknown_kernels_and_a_short_cache_are_refused(zoo):
    model = zoo.model(CASE)
    with pytest.raises(ArgumentError, match="kernels='cuda' is not known; choose 'pallas', 'pallas-triton',"):
        generate(model, [[1]], max_new_tokens=1, kernels="cuda")
    with pytest.raises(ValueError, match="cache_length = 4 is less than the 5 tokens"):
        prefill(model, jnp.ones((1, 5), jnp.int32), jnp.array([5]), cache_length=4, kernels="xla")


def test_the_cache_is_donated_and_counts(zoo):
    model = zoo.model(CASE, tp=2)
    tokens, lengths = jnp.ones((2, 16), jnp.int32), jnp.array([16, 9], jnp.int32)
    _, cache = prefill(model, tokens, lengths, cache_length=64, kernels="xla")
    assert cache.lengths.tolist() == [16, 9]
    before = jax.tree.leaves((cache.deltas, cache.attentions))
    _, after = decode_step(model, jnp.array([1, 2]), cache, kernels="xla")
    assert after.lengths.tolist() == [17, 10]
    assert all(a.is_deleted() for a in before)


@pytest.mark.parametrize("case", [CASE, "odd-experts"])
def test_the_most_likely_token_over_all_ranks(zoo, case):
    """With the vocabulary cut over the ranks, and with one that tp does not divide; ties go to the lower id."""
    logits = np.random.default_rng(0).integers(0, 4, (50, zoo.config(case).vocab_size)).astype(np.float32)
    assert np.array_equal(most_likely(zoo.model(case, tp=4), logits), logits.argmax(-1))


def test_the_greedy_step_is_a_decode_step_and_its_arg_max(zoo):
    model = zoo.model(CASE, tp=2)
    tokens, lengths = jnp.ones((2, 16), jnp.int32), jnp.array([16, 9], jnp.int32)
    now = jnp.array([3, 4], jnp.int32)
    _, cache = prefill(model, tokens, lengths, cache_length=64, kernels="xla")
    chosen, after = greedy_step(model, now, jax.tree.map(jnp.copy, cache), kernels="xla")
    logits, same = decode_step(model, now, cache, kernels="xla")
    assert np.array_equal(chosen, np.asarray(logits).argmax(-1))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(same), strict=True))


def test_ranks_find_the_best_token_by_a_link_as_they_do_without():
    """Ties between ranks and within them, zeros of both signs, and rows that are lost: on one rank, on several, on all."""
    mesh, tp, rows, width = Mesh(np.array(jax.devices()[:4]), ("tp",)), 4, 12, 5
    logits = np.random.default_rng(0).integers(-2, 3, (rows, tp * width)).astype(np.float32)
    logits[1], logits[2, ::2], logits[3] = 0, -0.0, -7
    logits[4, 6], logits[5, 19], logits[6, 0], logits[7] = np.nan, np.inf, -np.inf, np.nan
    logits[8, [3, 9]] = np.nan, np.inf
    link = Link(jnp.zeros(tp * 20, jnp.int32), jnp.zeros(tp * 16, jnp.int32), "tp", tp, 16, 64, 132)

    def found(x, link):
        plain = _most_likely(x, True, partial(lax.all_gather, axis_name="tp"))
        gather = Gathered(link, "pallas")
        return plain, _most_likely(x, True, gather), gather.link

    specs = {"in_specs": (P(None, "tp"), link.specs), "out_specs": (P(), P(), link.specs)}
    plain, linked, _ = jax.jit(jax.shard_map(found, mesh=mesh, check_vma=False, **specs))(logits, link)
    lost = ~np.isfinite(logits).all(-1)
    np.testing.assert_array_equal(linked, plain)
    np.testing.assert_array_equal(linked, np.where(lost, -1, logits.argmax(-1)))


def test_a_step_with_a_link_makes_the_same_tokens(zoo):
    """On a CPU, where packets do not go, the ranks gather and add up in their order; the link comes back as it was."""
    model = zoo.model(CASE, tp=2)
    tokens, lengths = jnp.ones((2, 16), jnp.int32), jnp.array([16, 9], jnp.int32)
    now = jnp.array([3, 4], jnp.int32)
    _, cache = prefill(model, tokens, lengths, cache_length=64, kernels="xla")
    chosen, after = greedy_step(model, now, jax.tree.map(jnp.copy, cache), kernels="xla")
    link = Link(jnp.zeros(24, jnp.int32), jnp.zeros(32, jnp.int32), "tp", 2, 16, 2048, 132)
    same, linked, link = greedy_step(model, now, cache, kernels="xla", link=link)
    assert np.array_equal(chosen, same)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(linked), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert not np.asarray(link.epochs).any()
