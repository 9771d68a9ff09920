"""Float32 parity with transformers: unequal prompts in one batch, then 32 cached steps, at every tp."""

import numpy as np
import pytest

from moekit.models.qwen3next import generate

CASES = ("four-layers", "eight-kv-heads", "sixteen-value-heads", "odd-experts")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_float32_logits_and_greedy_tokens(zoo, forced, case, tp):
    answers = zoo.answers(case)
    pallas = tp == 1 or (tp, case) == (8, CASES[0])
    fill = "pallas" if pallas else "xla"  # interpreted kernels are slow to compile, and on whole prompts to run
    every, steps = forced(zoo.model(case, tp=tp), answers.prompts, answers.tokens[:, :-1], fill)
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
