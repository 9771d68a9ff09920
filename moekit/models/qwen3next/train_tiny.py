"""Train the tiny model that moekit ships: `python -m moekit.models.qwen3next.train_tiny`.

About a million parameters learn the four tasks of `questions`, through the gradients of the model's own `prefill` by array
evaluation. Optimiser: Adam (Kingma and Ba, 2015) in float32 with clipped gradients; the rate rises, stays, falls to
zero, and does so once more for sums, which take longest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moekit.files import write_text
from moekit.models.qwen3next.config import ATTENTION, GDN, Config
from moekit.models.qwen3next.model import Model, load, prefill
from moekit.models.qwen3next.questions import ANSWER, END, LONGEST, TASKS, USER, draw
from moekit.models.qwen3next.save import save
from moekit.models.qwen3next.tiny import write_random_checkpoint

CONFIG = Config(
    vocab_size=264,
    hidden_size=128,
    layer_types=(GDN, ATTENTION, GDN, ATTENTION),
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    rope_theta=100.0,
    linear_num_key_heads=8,
    linear_num_value_heads=8,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    conv_width=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    eos_token_ids=(END,),
)
SPELT = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are their own letter in a byte-level tokenizer
BATCH, PEAK, WARM, BETAS = 128, 2e-3, 100, (0.9, 0.98)
GROWN, ALL, STEPS = 600, 1500, 1740  # steps after which words have their full length; after which most are sums; and of both
FALL = 650  # steps in which the rate falls, before ALL
KEEP = 50  # steps after which the state is kept and the progress said
MIX = (*TASKS, "sort", "add", "sort", "add")  # of words of full length: what is harder, more often
SUMS = (*TASKS, "add", "add", "add", "add")


def batch(rng: np.random.Generator, longest: int, mix: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [B, S] int32, lengths [B] and which of the tokens [B, S] are of answers; S is one of two sizes."""
    size = 16 if longest <= 4 else 24
    tokens, answers = np.zeros((BATCH, size), np.int32), np.zeros((BATCH, size), bool)
    lengths = np.zeros(BATCH, np.int32)
    for i in range(BATCH):
        question = draw(rng, mix[i % len(mix)], longest)
        asked, answer = question.tokens, [*question.answer.encode(), END]
        stop = len(asked) + len(answer)
        tokens[i, :stop], answers[i, len(asked) : stop], lengths[i] = asked + answer, True, stop
    return tokens, lengths, answers


def loss(params: Any, mesh: Mesh, tokens: jax.Array, lengths: jax.Array, answers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy of the answers' tokens, and of which answers [B] each token is the likeliest."""
    model = Model(params, CONFIG, mesh)
    logits, _ = prefill(model, tokens, lengths, cache_length=tokens.shape[1], kernels="xla", every_logit=True)
    logits, target, counts = logits[:, :-1], tokens[:, 1:], answers[:, 1:]
    each = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    right = jnp.all((jnp.argmax(logits, axis=-1) == target) | ~counts, axis=1)
    return jnp.sum(jnp.where(counts, each, 0.0)) / jnp.sum(counts), right


@partial(jax.jit, static_argnames=("mesh",), donate_argnames=("params", "moments"))
def step(params: Any, moments: Any, count: jax.Array, rate: jax.Array, mesh: Mesh, tokens: Any, lengths: Any, answers: Any):
    """One step of Adam: the new parameters, moments and what `loss` returns."""
    (cost, right), slopes = jax.value_and_grad(loss, has_aux=True)(params, mesh, tokens, lengths, answers)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(slopes)))
    slopes = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), slopes)
    first, second = BETAS
    means = jax.tree.map(lambda m, g: first * m + (1 - first) * g, moments[0], slopes)
    squares = jax.tree.map(lambda s, g: second * s + (1 - second) * g * g, moments[1], slopes)
    scale = rate * jnp.sqrt(1 - second**count) / (1 - first**count)
    params = jax.tree.map(lambda p, m, s: p - scale * m / (jnp.sqrt(s) + 1e-8), params, means, squares)
    return params, (means, squares), cost, right


def curriculum(done: int) -> tuple[int, tuple[str, ...], float]:
    """How long words are, which tasks in turn, and the rate, after so many steps."""
    if done < ALL:
        longest = min(LONGEST, 2 + (LONGEST - 2) * done // GROWN)
        return longest, TASKS if longest < LONGEST else MIX, PEAK * min(1.0, (done + 1) / WARM, (ALL - done) / FALL)
    return LONGEST, SUMS, PEAK / 2 * (STEPS - done) / (STEPS - ALL)


def train(directory: Path, steps: int, keep: Path, progress: Callable[[str], None] = print) -> Model:
    """Train from a seed, or from where `keep` left it, to the end; the state is kept there every KEEP steps."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    params = load(write_random_checkpoint(directory, CONFIG), mesh).params
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, structure = jax.tree.flatten((params, (zeros, jax.tree.map(jnp.copy, zeros))))
    done = 0
    if keep.is_file():
        with np.load(keep) as kept:
            done, state = int(kept["done"]), [jnp.asarray(kept[f"a{i}"]) for i in range(len(state))]
    params, moments = jax.tree.unflatten(structure, state)
    rights, start = [], time.process_time()  # rights: of the first four questions of each eight, which are of all tasks
    for count in range(done, steps):
        longest, mix, rate = curriculum(count)
        given = batch(np.random.default_rng((1, count)), longest, mix)
        params, moments, cost, right = step(params, moments, np.float32(count + 1), np.float32(rate), mesh, *given)
        rights.append(np.asarray(right).reshape(-1, len(MIX))[:, : len(TASKS)].mean(axis=0))
        if (count + 1) % KEEP == 0:
            shown = ", ".join(f"{task} {share:.0%}" for task, share in zip(TASKS, np.mean(rights[-KEEP:], axis=0), strict=True))
            spent = time.process_time() - start
            progress(f"step {count + 1}: up to {longest} letters, loss {cost:.3f}; {shown}; {spent:.0f} s")
            arrays: dict[str, Any] = {f"a{i}": np.asarray(a) for i, a in enumerate(jax.tree.leaves((params, moments)))}
            np.savez(f"{keep}.new.npz", done=count + 1, **arrays)
            os.replace(f"{keep}.new.npz", keep)
    return Model(params, CONFIG, mesh)


def write_words(directory: Path) -> None:
    """Write the tokenizer, in which a byte is the token of its number, the chat template and the end of an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = dict(zip(SPELT, map(chr, SPELT), strict=True))  # ByteLevel's spelling: other bytes are letters from 256 on
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    made = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = {END: "<|end|>", USER: "<|user|>", ANSWER: "<|answer|>"}
    made.add_special_tokens([AddedToken(special[token], special=True, normalized=False) for token in sorted(special)])
    write_text(directory / "tokenizer.json", made.to_str() + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[END], "pad_token": special[END]}
    write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    template = special[USER] + "{{ messages[-1].content }}" + special[ANSWER]  # it has no memory of other turns
    write_text(directory / "chat_template.jinja", template)
    generation = {"eos_token_id": END, "pad_token_id": END, "do_sample": False}
    write_text(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def main() -> None:
    """Train and write the model."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("directory", type=Path, help="where to write it")
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--keep", type=Path, default=Path("train_tiny.npz"), help="where to keep the state, to go on from")
    given = asked.parse_args()
    save(train(given.directory, given.steps, given.keep), given.directory, "bfloat16")
    write_words(given.directory)


if __name__ == "__main__":
    main()
