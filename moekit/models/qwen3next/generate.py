"""Greedy generation for a batch of prompts of any lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moekit.errors import DtypeError, NonFiniteError, ShapeError
from moekit.jax import Channel
from moekit.models.qwen3next.checks import LOST, positive, token_ids
from moekit.models.qwen3next.config import Config, ConfigError
from moekit.models.qwen3next.exchanged import check_channel, locked
from moekit.models.qwen3next.files import brief, read_json, shown
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
    prompts: Any,
    *,
    max_new_tokens: int,
    eos: Any = None,
    kernels: str | Kernels | None = None,
    progress: Callable[[Progress], None] | None = None,
    channel: Channel | None = None,
) -> Generation:
    """Continue each prompt greedily.

    prompts: for each sequence its token ids, at least one: lists of any lengths, or arrays or tensors of integers
    of any framework; an array [B, S] is B prompts. eos: the token ids that end a sequence, an int or a collection
    or array of them (none by default; `end_tokens` are the checkpoint's). kernels: 'pallas', 'pallas-triton', 'triton'
    or 'xla'; None is the first that is there. progress is called once per new token. channel: of the model's mesh, by
    which its ranks add up without psum.

    Raises, before anything is compiled, DtypeError for what is no integer (text, 1.5, True), ShapeError for an empty
    or nested prompt, and ArgumentError for an id outside the vocabulary or no token to make; and NonFiniteError, at
    the first token that has none, where the logits of a running sequence hold NaN or an infinity; and RankError, at
    the end, where a rank of the channel did not come.
    """
    prompts = _checked_prompts(prompts, model.config.vocab_size)
    max_new_tokens = positive("max_new_tokens", max_new_tokens)
    stops = frozenset(() if eos is None else token_ids("eos", eos, model.config.vocab_size))
    kernels = resolve(kernels)
    if channel is not None:
        check_channel(channel, model.mesh, model.config.hidden_size, 0, "generate", "prompts")  # more are gathered
    mail = channel and channel.mail
    run = _Run(len(prompts), max_new_tokens, stops, progress)
    calls = _calls(model, prompts, max_new_tokens, kernels, channel)
    try:
        for stage in ("prefill", "decode"):  # each compiles, so each is awaited before the next is dispatched
            if not run.finished:
                run.take(stage, next(calls))
        waiting = None if run.finished else next(calls)
        while waiting is not None:
            following = next(calls, None)  # runs on the devices while the host waits for the one before
            run.take("decode", waiting)
            waiting = None if run.finished else following
    finally:
        if channel is not None:  # a rank that did not come leaves what may be no number, too
            channel.check(mail)
    return run.result()


def _calls(
    model: Model, prompts: list[list[int]], total: int, kernels: Kernels, channel: Channel | None
) -> Iterator[jax.Array]:
    """Dispatch a prefill and then decode steps, one at a time when asked; yields each one's new tokens [B]."""
    tokens, lengths, room = padded(prompts, total)
    with locked(channel):
        logits, memory = prefill(model, tokens, lengths, cache_length=room, kernels=kernels)
        current = most_likely(model, logits)
    del logits
    yield current
    for _ in range(total - 1):
        if channel is None:
            current, memory = greedy_step(model, current, memory, kernels=kernels)
        else:
            with channel.lock:
                current, memory, link = greedy_step(model, current, memory, kernels=kernels, link=channel.link)
                channel.keep(link)
        yield current


def end_tokens(checkpoint_dir: str | Path, config: Config) -> tuple[int, ...]:
    """The token ids that end a sequence: those of generation_config.json where it names any, else config.json's.

    Raises ConfigError where generation_config.json cannot be read or names what is no token id.
    """
    path = Path(checkpoint_dir) / "generation_config.json"
    if not path.exists():
        return config.eos_token_ids
    named = read_json(path, ConfigError).get("eos_token_id")
    if named is None or named == []:
        return config.eos_token_ids
    ids = named if isinstance(named, list) else [named]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{shown(path)}: eos_token_id is {brief(named)} where a token id or a list of them is needed")
    return tuple(ids)


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
                if token == LOST:
                    raise NonFiniteError(
                        f"generate: the logits of sequence {i} hold NaN or an infinity at new token {len(self.tokens[i])}; "
                        f"its activations leave the range of the model's dtype, or a kernel is at fault"
                    )
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


def _checked_prompts(prompts: Any, vocabulary: int) -> list[list[int]]:
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise DtypeError(f"prompts is {prompts!r}; lists of token ids are needed: a tokenizer makes them of text")
    found = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
            raise ShapeError(f"prompts[{i}] is {prompt!r} where a list of token ids is needed; put a single prompt in a list")
        found.append(token_ids(f"prompt {i}", prompt, vocabulary))
        if not found[-1]:
            raise ShapeError(f"prompt {i} is empty; each needs at least one token")
    if not found:
        raise ShapeError("prompts is empty; at least one prompt is needed")
    return found


def padded(prompts: Sequence[Sequence[int]], total: int) -> tuple[np.ndarray, np.ndarray, int]:
    """What `prefill` takes: tokens [B, S], lengths [B] and a cache's length with room for `total` more."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _round_up(int(lengths.max()), PROMPT_BUCKET)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths, _round_up(tokens.shape[1] + total, CACHE_BUCKET)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
