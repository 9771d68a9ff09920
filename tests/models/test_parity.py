"""Float32 parity with transformers: unequal prompts in one batch, then 32 cached steps, at every tp.

Of one model at each tp; of the others at two, with other ones in test_parity_bfloat16.py and test_layers.py.
"""

import numpy as np
import pytest

from moekit.models.qwen3next import generate

WHERE = {"four-layers": (1, 2, 4, 8), "eight-kv-heads": (1, 8), "sixteen-value-heads": (1, 8), "odd-experts": (1, 2)}


@pytest.mark.parametrize(("case", "tp"), [(case, tp) for case, tps in WHERE.items() for tp in tps])
def test_float32_logits_and_greedy_tokens(zoo, forced, case, tp):
    answers = zoo.answers(case)
    pallas = tp == 1 or (case, tp) == ("four-layers", 8)
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
