"""Parity with transformers: prompts of unequal lengths in one batch, then 32 cached steps, at every tp."""

import jax.numpy as jnp
import numpy as np
import pytest

from moekit.models.qwen3next import decode_step, generate, prefill

CASES = ("four-layers", "eight-layers", "sixteen-value-heads", "odd-experts")
ROOM = 128


def padded(prompts):
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.full((len(prompts), lengths.max() + 2), 1, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def forced(model, prompts, tokens, kernels="pallas"):
    """Logits after each prompt and after each of the given tokens [B, N]: every prompt position, and [B, N + 1, V]."""
    ids, lengths = padded(prompts)
    every, cache = prefill(model, ids, lengths, cache_length=ROOM, every_logit=True, kernels=kernels)
    every = np.asarray(every)
    steps = [every[np.arange(len(prompts)), np.asarray(lengths) - 1]]
    for token in np.asarray(tokens, np.int32).T:
        logits, cache = decode_step(model, jnp.asarray(token), cache, kernels=kernels)
        steps.append(np.asarray(logits))
    return [row[: len(p)] for row, p in zip(every, prompts, strict=True)], np.stack(steps, axis=1)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_float32_logits_and_greedy_tokens(zoo, case, tp):
    answers = zoo.answers(case)
    every, steps = forced(zoo.model(case, tp=tp), answers.prompts, answers.tokens[:, :-1])
    for mine, theirs in zip(every, answers.prompt_logits, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.abs(steps - answers.logits).max() <= 1e-4 * np.abs(answers.logits).max()
    assert np.array_equal(steps.argmax(-1), answers.tokens)


@pytest.mark.parametrize(("tp", "kernels"), [(1, "xla"), (8, "pallas")])
def test_generate_gives_the_greedy_tokens(zoo, tp, kernels):
    answers = zoo.answers("four-layers")
    made = generate(zoo.model("four-layers", tp=tp), answers.prompts, max_new_tokens=33, kernels=kernels)
    assert np.array_equal(np.array(made.tokens), answers.tokens)
    assert len({token for row in made.tokens for token in row}) > 20, "the tiny model's tokens hardly vary"


@pytest.mark.parametrize(
    ("case", "tp"), [(case, tp) for case in CASES for tp in (1, 2, 4, 8) if tp in (1, 8) or case == CASES[0]]
)
def test_bfloat16_error_is_that_of_transformers(zoo, case, tp):
    """Teacher-forced on random tokens, against a float64 run of the same bfloat16 weights."""
    exact, theirs, sequences = zoo.narrow_answers(case)
    every, steps = forced(zoo.model(case, "bfloat16", tp), sequences[:, :8].tolist(), sequences[:, 8:])
    mine = np.concatenate([np.stack(every)[:, :-1], steps], axis=1)
    error = theirs - exact
    assert root_mean_square(mine - exact) <= 1.5 * root_mean_square(error)
    top = np.sort(exact, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * np.abs(error).max()
    assert clear.any()
    assert np.array_equal(mine.argmax(-1)[clear], exact.argmax(-1)[clear])


def root_mean_square(x):
    return np.sqrt(np.mean(x**2))
