"""The work behind `moekit evaluate`: who answers what, how many are right, and how far a layer is off. It imports jax."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moekit.models.qwen3next import Config, Model, generate, reference
from moekit.models.qwen3next.exchanged import channel_of
from moekit.models.qwen3next.model import layer_output
from moekit.models.qwen3next.questions import TASKS, Question
from moekit.models.qwen3next.save import tensors_of

Ids = Sequence[Sequence[int]]
Advance = Callable[[int, int], None]
TOGETHER = 64  # prompts of one length that transformers reads at once


@dataclass(frozen=True)
class Row:
    """The texts that one kind of kernels answered in one dtype, and the worst layer with its error."""

    kernels: str
    dtype: str
    texts: list[str]
    error: tuple[int, float] | None


def by(model: Model, kernels: str, prompts: Ids, batch: int, new: int, ends: Sequence[int], advance: Advance) -> Ids:
    """The greedy tokens of each prompt, `batch` at a time."""
    found: list[Sequence[int]] = []
    channel, _ = channel_of(model.mesh, batch, model.config.hidden_size, kernels)
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        asked = some + some[:1] * (batch - len(some))  # so that one program serves all
        made = generate(model, asked, max_new_tokens=new, eos=ends, kernels=kernels, channel=channel)
        found += made.tokens[: len(some)]
        advance(len(found), len(prompts))
    return found


def by_transformers(directory: Path, dtype: str, prompts: Ids, new: int, ends: Sequence[int], advance: Advance) -> Ids:
    """The greedy tokens of transformers' model, prompts of one length at a time, so that none is padded."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, plain = getattr(torch, dtype), {"attn_implementation": "eager", "experts_implementation": "eager"}
    if Config.from_json(directory).blocks is None:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=kind, **plain).eval()
    else:  # as moekit reads FP8; what is not FP8 keeps its dtype there
        read = FineGrainedFP8Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind, quantization_config=read, **plain).to(kind).eval()
    alike = defaultdict(list)
    for at, prompt in enumerate(prompts):
        alike[len(prompt)].append(at)
    found: dict[int, list[int]] = {}
    for places in alike.values():
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            ids = torch.tensor([list(prompts[at]) for at in some])
            how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": list(ends) or None, "pad_token_id": 0}
            with torch.no_grad():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.shape[1] :].tolist()
            found |= {at: _ended(tokens, ends) for at, tokens in zip(some, made, strict=True)}
            advance(len(found), len(prompts))
    return [found[at] for at in range(len(prompts))]


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer."""
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def layer_error(model: Model, kernels: str, prompts: Ids) -> tuple[int, float]:
    """The layer furthest from the float64 reference, and how far: root mean square of the error over that of what it adds.

    Each layer is fed what the reference has before it, rounded to the model's dtype. NaN is infinitely far.
    """
    tensors, shortest = tensors_of(model), min(map(len, prompts))
    tokens = np.array([prompt[:shortest] for prompt in prompts])
    hidden, worst = tensors["model.embed_tokens.weight"][tokens].astype(np.float64), (0, 0.0)
    for at in range(model.config.num_layers):
        given = hidden.astype(jnp.dtype(model.dtype))
        wide = given.astype(np.float64)
        hidden = reference.layer_output(tensors, model.config, at, wide)
        made = np.asarray(layer_output(model, given, at=at, kernels=kernels), np.float64)
        error = float(np.sqrt(np.mean((made - hidden) ** 2) / np.mean((hidden - wide) ** 2)))
        worst = max(worst, (at, np.inf if np.isnan(error) else error), key=lambda found: found[1])
    return worst


def scored(row: Row, asked: Sequence[Question], rows: Sequence[Row]) -> dict[str, Any]:
    """A row of the report: exact answers, of each task too, and how many are not what `xla` says in the same dtype."""
    right = [text == question.answer for text, question in zip(row.texts, asked, strict=True)]
    tasks = {}
    for task in TASKS:
        own = [ok for ok, question in zip(right, asked, strict=True) if question.task == task]
        tasks[task] = (sum(own), len(own))
    unfused = next((other for other in rows if (other.kernels, other.dtype) == ("xla", row.dtype)), None)
    differ = None
    if unfused is not None and unfused is not row:
        differ = sum(a != b for a, b in zip(row.texts, unfused.texts, strict=True))
    worst = None if row.error is None else {"layer": row.error[0], "error": row.error[1]}
    return {
        "kernels": row.kernels,
        "dtype": row.dtype,
        "right": sum(right),
        "tasks": tasks,
        "differ": differ,
        "layer_error": worst,
    }
