"""Greedy generation for a batch of prompts of any lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from moekit.models.qwen3next.kernels import Kernels, resolve
from moekit.models.qwen3next.model import Model, greedy_step, most_likely, prefill

PROMPT_BUCKET, CACHE_BUCKET = 16, 64  # lengths are rounded up to these, so that few programs are compiled


@dataclass(frozen=True)
class Progress:
    """One finished call. stage: 'prefill' or 'decode'; step counts new tokens of each sequence, of `total`.

    seconds: since the tokens before it. tokens: the new token of each sequence.
    """

    stage: str
    step: int
    total: int
    seconds: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What `generate` made.

    tokens: the new tokens of each sequence, up to and including an end-of-sequence token. prefill_seconds and
    first_step_seconds include compiling; steady_seconds is the time of the steady_steps decode steps after
    the first.
    """

    tokens: tuple[tuple[int, ...], ...]
    prefill_seconds: float
    first_step_seconds: float
    steady_seconds: float
    steady_steps: int

    @property
    def steady_tokens_per_second(self) -> float:
        """New tokens of all sequences per second, after the first decode step; 0 where there was only one."""
        return len(self.tokens) * self.steady_steps / self.steady_seconds if self.steady_steps else 0.0


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: int | Collection[int] | None = None,
    kernels: str | Kernels = "pallas",
    progress: Callable[[Progress], None] | None = None,
) -> Generation:
    """Continue each prompt greedily.

    prompts: token ids, of any lengths of at least 1. eos: token ids that end a sequence (none by default;
    `model.config.eos_token_ids` are the checkpoint's). kernels: 'pallas' or 'xla'. progress is called once
    per new token. Raises ValueError on an empty prompt, an id outside the vocabulary or a bad number of
    tokens.
    """
    _check_prompts(model, prompts, max_new_tokens)
    kernels = resolve(kernels)
    stops = frozenset((eos,) if isinstance(eos, int) else eos or ())
    run = _Run(len(prompts), max_new_tokens, stops, progress)
    calls = _calls(model, prompts, max_new_tokens, kernels)
    for stage in ("prefill", "decode"):  # each compiles, so each is awaited before the next is dispatched
        if not run.finished:
            run.take(stage, next(calls))
    waiting = None if run.finished else next(calls)
    while waiting is not None:
        following = next(calls, None)  # runs on the devices while the host waits for the one before
        run.take("decode", waiting)
        waiting = None if run.finished else following
    return run.result()


def _calls(model: Model, prompts: Sequence[Sequence[int]], total: int, kernels: Kernels) -> Iterator[jax.Array]:
    """Dispatch a prefill and then decode steps, one at a time when asked; yields each one's new tokens [B]."""
    tokens, lengths = _padded(prompts)
    room = _round_up(tokens.shape[1] + total, CACHE_BUCKET)
    logits, memory = prefill(model, tokens, lengths, cache_length=room, kernels=kernels)
    current = most_likely(model, logits)
    del logits
    yield current
    for _ in range(total - 1):
        current, memory = greedy_step(model, current, memory, kernels=kernels)
        yield current


class _Run:
    """The host's side of a generation: tokens so far, which sequences ended, and when."""

    def __init__(self, batch: int, total: int, stops: frozenset[int], progress: Callable[[Progress], None] | None):
        self.total, self.stops, self.progress = total, stops, progress
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.ended = [False] * batch
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended or has all its tokens."""
        return len(self.seconds) == self.total or all(self.ended)

    def take(self, stage: str, current: jax.Array) -> None:
        """Wait for one call's tokens and note them."""
        new = tuple(int(token) for token in np.asarray(current))
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        for i, token in enumerate(new):
            if not self.ended[i]:
                self.tokens[i].append(token)
                self.ended[i] = token in self.stops
        if self.progress is not None:
            self.progress(Progress(stage, len(self.seconds), self.total, self.seconds[-1], new))
        self.since = time.perf_counter()

    def result(self) -> Generation:
        """The tokens and the times of the whole run."""
        decode = self.seconds[1:]
        return Generation(
            tokens=tuple(tuple(tokens) for tokens in self.tokens),
            prefill_seconds=self.seconds[0],
            first_step_seconds=decode[0] if decode else 0.0,
            steady_seconds=sum(decode[1:]),
            steady_steps=len(decode[1:]),
        )


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} where at least 1 is needed")
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; each needs at least one token")
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise ValueError(f"prompt {i} holds token {token}, outside the vocabulary of {vocabulary}")


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _round_up(int(lengths.max()), PROMPT_BUCKET)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
