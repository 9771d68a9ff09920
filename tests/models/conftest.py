"""Tiny Qwen3-Next checkpoints, transformers' answers to them, and the same models here at every tp."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

if "jax" not in sys.modules:  # as the top-level conftest does: eight virtual devices where there is no GPU
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from transformers import Qwen3NextForCausalLM

from moekit.models.qwen3next import TINY, Config, Model, decode_step, load, prefill, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN

CASES = {
    "four-layers": replace(TINY, vocab_size=256),
    "eight-kv-heads": replace(
        TINY,
        vocab_size=256,
        layer_types=(GDN, ATTENTION) * 2,
        linear_num_value_heads=8,
        num_key_value_heads=8,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "sixteen-value-heads": replace(
        TINY,
        vocab_size=256,
        layer_types=(GDN, ATTENTION),
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=8,
        shared_expert_intermediate_size=32,
        norm_topk_prob=False,
    ),
    "odd-experts": replace(
        TINY,
        vocab_size=251,
        num_experts=13,
        num_experts_per_tok=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        layer_types=(GDN, ATTENTION),
    ),
    "two-layers": replace(TINY, vocab_size=256, layer_types=(GDN, ATTENTION)),
}
FILES = {"sixteen-value-heads": 3, "odd-experts": 2}  # of the checkpoint; one for the others
LENGTHS, NEW = (70, 3), 32  # more than a chunk of the delta rule, and less than the convolution's width


@dataclass(frozen=True)
class Answers:
    """What transformers says of one model in float32.

    prompts: token ids. prompt_logits: [S, V] of each. tokens [B, NEW + 1] its greedy continuation and logits
    [B, NEW + 1, V] those it came from: the first of a row from the prompt, the others from cached steps.
    """

    prompts: list[list[int]]
    prompt_logits: list[np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray


class Zoo:
    """Checkpoints and models by name of case, dtype and tp, each made once."""

    def __init__(self, root: Path):
        self.directory = cache(lambda case, dtype="float32": self._write(root, case, dtype))
        self.transformers = cache(self._transformers)
        self.model = cache(self._model)
        self.answers = cache(self._answers)
        self.narrow_answers = cache(self._narrow_answers)

    def config(self, case: str) -> Config:
        """The Config of a case."""
        return CASES[case]

    def prompts(self, case: str) -> list[list[int]]:
        """Random prompts of unequal LENGTHS."""
        rng = np.random.default_rng(7)
        return [rng.integers(0, CASES[case].vocab_size, n).tolist() for n in LENGTHS]

    def _write(self, root: Path, case: str, dtype: str) -> Path:
        seed = list(CASES).index(case)
        where = root / f"{case}-{dtype}"
        return write_random_checkpoint(where, CASES[case], seed, dtype, files=FILES.get(case, 1))

    def _transformers(self, case: str, dtype: str = "float32", wide: bool = False) -> Qwen3NextForCausalLM:
        kind = getattr(torch, dtype)
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = Qwen3NextForCausalLM.from_pretrained(self.directory(case, dtype), dtype=kind, **plain).eval()
        return model.double() if wide else model

    def _model(self, case: str, dtype: str = "float32", tp: int = 1) -> Model:
        return load(self.directory(case, dtype), mesh_of(tp))

    def _answers(self, case: str) -> Answers:
        model = self.transformers(case)
        prompts, prompt_logits, tokens, logits = self.prompts(case), [], [], []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor([prompt])
                prompt_logits.append(model(ids).logits[0].numpy())
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW + 1,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                tokens.append(out.sequences[0, len(prompt) :].numpy())
                logits.append(torch.cat(out.logits).numpy())
        return Answers(prompts, prompt_logits, np.stack(tokens), np.stack(logits))

    def _narrow_answers(self, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The logits of the bfloat16 model run in float64 and in bfloat16, and the random tokens they are of."""
        sequences = np.random.default_rng(11).integers(0, CASES[case].vocab_size, (8, 24 + NEW))
        models = self.transformers(case, "bfloat16", wide=True), self.transformers(case, "bfloat16")
        with torch.no_grad():
            exact, narrow = (model(torch.tensor(sequences)).logits.double().numpy() for model in models)
        return exact, narrow, sequences


def mesh_of(tp: int) -> Mesh:
    """A mesh of the first `tp` devices."""
    return Mesh(np.array(jax.devices("cpu")[:tp]), ("tp",))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Every tiny model of these tests."""
    torch.set_num_threads(1)
    return Zoo(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def mesh() -> Callable[[int], Mesh]:
    """From tp to a mesh."""
    return mesh_of


def padded(prompts):
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.full((len(prompts), lengths.max() + 2), 1, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def teacher_forced(model, prompts, tokens, fill="pallas", step="pallas"):
    """The logits of every prompt position, and those after each prompt and each of tokens [B, N]: [B, N + 1, V].

    fill, step: the kernels that read the prompts, and those of the steps.
    """
    ids, lengths = padded(prompts)
    every, cache = prefill(model, ids, lengths, cache_length=128, every_logit=True, kernels=fill)
    every = np.asarray(every)
    steps = [every[np.arange(len(prompts)), np.asarray(lengths) - 1]]
    for token in np.asarray(tokens, np.int32).T:
        logits, cache = decode_step(model, jnp.asarray(token), cache, kernels=step)
        steps.append(np.asarray(logits))
    return [row[: len(p)] for row, p in zip(every, prompts, strict=True)], np.stack(steps, axis=1)


@pytest.fixture(scope="session")
def forced():
    """teacher_forced, for tests."""
    return teacher_forced


@pytest.fixture(scope="module", autouse=True)  # of a session it would hold in the folders after this one, too
def untuned():
    """The heuristic's schedules on every machine: what a GPU's table says is no part of these tests."""
    import moekit.tune.table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moekit.tune.table, "table", lambda device: {})
        yield
