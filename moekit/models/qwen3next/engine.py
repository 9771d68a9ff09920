"""Many sequences at once: they join and leave between steps.

A sequence has one row, a slot, of a cache of fixed size. Pages would save memory where few sequences are long; but only a
quarter of the layers keep something of every token, the others' states are of one size, and a step reads rows in place. A
prompt is read piece by piece into a row of its own, one piece between two steps, and copied into its slot when it is whole, so
that nothing half read is ever among what a step writes.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.errors import ArgumentError, MoekitError, ShapeError
from moekit.jax import Channel, Link
from moekit.models.qwen3next.cache import Cache, cache_shapes
from moekit.models.qwen3next.checks import LOST, positive, token_ids
from moekit.models.qwen3next.exchanged import check_channel, locked
from moekit.models.qwen3next.extend import empty_cache, extend
from moekit.models.qwen3next.kernels import Kernels, resolve
from moekit.models.qwen3next.memory import check_rows_fit
from moekit.models.qwen3next.model import Model, decode_step, greedy_step, most_likely
from moekit.models.qwen3next.sampling import GREEDY, Draws, Sampling, draw

SMALLEST_PIECE = 16


class FullError(MoekitError, RuntimeError):
    """An engine that has as many sequences, waiting ones included, as it takes."""


@dataclass(frozen=True)
class Token:
    """A new token of a sequence, or its end without one: then it is -1.

    end: None, or why nothing follows: after a token 'stop' (it is one of `eos`) or 'length'; without one 'failed' or
    'cancelled'. A sequence fails where its logits are NaN or infinite, and then the others go on; and where the devices fail.
    """

    sequence: int
    token: int
    end: str | None


@dataclass(frozen=True)
class Result:
    """All new tokens of a sequence, and why it ended, as in `Token`."""

    tokens: tuple[int, ...]
    end: str


@dataclass(eq=False)
class _Sequence:
    number: int
    prompt: np.ndarray
    most: int
    stops: frozenset[int]
    sampling: Sampling
    read: int = 0
    dispatched: int = 0  # tokens asked of the devices
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Decodes up to `slots` sequences at once, each of at most `length` tokens with its prompt.

    piece: the most tokens of a prompt read between two steps; shorter ones are padded to one of three sizes, so that few
    programs are compiled. ahead: steps dispatched before the first is waited for. waiting: the sequences that may wait for
    a slot. Each sequence gets the tokens that it would get alone. One thread at a time may call `step` or `results`; any
    other may call `add` and `cancel` meanwhile, which never wait for a device. channel: of the model's mesh, with room for
    `slots` rows, by which its ranks add up in a step without psum (`channel_of` makes one); a rank that does not come is an
    error of the devices. Raises FitError, before anything is placed, where the devices have no room for the rows and what the
    steps need beside them, and ArgumentError for a channel that does not serve them.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 16,
        length: int = 4096,
        piece: int = 256,
        ahead: int = 2,
        waiting: int = 1024,
        kernels: str | Kernels | None = None,
        channel: Channel | None = None,
    ):
        self.model, self.kernels, self.channel = model, resolve(kernels), channel
        self.length, self.ahead = positive("length", length), positive("ahead", ahead)
        self.waiting = positive("waiting", waiting, least=0)
        self.pieces = sorted({max(SMALLEST_PIECE, positive("piece", piece) // part) for part in (1, 4, 16)})
        slots = positive("slots", slots)
        if channel is not None:
            check_channel(channel, model.mesh, model.config.hidden_size, slots, "engine", "slots")
        check_rows_fit(model.config, model.mesh, model.dtype, slots, self.length, self.pieces[-1])
        self._slots: list[_Sequence | None] = [None] * slots
        self._queue: deque[_Sequence] = deque()
        self._reading: tuple[_Sequence, Cache, jax.Array | None] | None = None
        self._flights: deque[tuple[jax.Array, Any, list[tuple[int, _Sequence]]]] = deque()
        self._rows: _Rows | None = _Rows.empty(model, slots, self.length, self.kernels)
        self._mail = channel and channel.mail  # the mailboxes that its steps go by
        self._lock = threading.Lock()  # sequences are added and fail as a whole
        self._count = 0
        self._live: dict[int, _Sequence] = {}  # those that have not ended
        self._cancelled: deque[int] = deque()
        self._found: list[tuple[_Sequence, Token]] = []  # what the next return of `step` tells
        self._results: dict[int, Result] = {}  # of a call of `results` that was interrupted

    def add(self, prompt: Any, *, max_new_tokens: int, eos: Any = None, sampling: Sampling = GREEDY) -> int:
        """Queue a prompt (token ids) and return the number of its sequence. eos: the tokens that end it.

        Raises as `generate` does; ArgumentError where prompt and new tokens are more than `length`; FullError where as
        many sequences wait as may.
        """
        vocabulary = self.model.config.vocab_size
        ids, most = token_ids("prompt", prompt, vocabulary), positive("max_new_tokens", max_new_tokens)
        if not ids:
            raise ShapeError("prompt is empty; it needs at least one token")
        if len(ids) + most > self.length:
            raise ArgumentError(
                f"a prompt of {len(ids)} tokens and {most} new ones are more than the engine's length of {self.length}; "
                "shorten one of them or make an engine of greater length"
            )
        if not isinstance(sampling, Sampling):
            raise ArgumentError(f"sampling is a {type(sampling).__name__}; a Sampling is needed")
        stops = frozenset(() if eos is None else token_ids("eos", eos, vocabulary))
        with self._lock:
            if len(self._live) >= self.waiting + len(self._slots):
                raise FullError(f"{len(self._queue)} sequences wait already; add this one when some have ended")
            self._count += 1
            sequence = _Sequence(self._count, np.array(ids, np.int32), most, stops, sampling)
            self._live[sequence.number] = sequence
            self._queue.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> bool:
        """End a sequence before its time: the next step says so ('cancelled') and frees its place. False where it had ended."""
        if number not in self._live:
            return False
        self._cancelled.append(number)
        return True

    @property
    def busy(self) -> bool:
        """Whether a sequence waits, is read, or has tokens or its end to come."""
        return bool(self._live or self._found or self._flights)

    def step(self) -> list[Token]:
        """Dispatch one piece of a prompt and one step of all slots; return the tokens that are known by then, in order.

        Empty while the first steps are on their way, and where there is nothing to do. Where it is interrupted (Ctrl-C) as it
        compiles or waits, the next call goes on from there. An error of the devices is raised once: every sequence has failed
        then, waiting ones included, which the next call says; and the engine can be used as a new one.
        """
        return [token for _, token in self._stepped()]

    def results(self) -> dict[int, Result]:
        """Step until every sequence has ended; what became of each whose end `step` has not said, by number."""
        while self.busy:
            for sequence, token in self._stepped():
                if token.end:
                    self._results[sequence.number] = Result(tuple(sequence.tokens), token.end)
        found, self._results = self._results, {}
        return found

    def warmup(self) -> None:
        """Compile every program that a step may need; raises ArgumentError where sequences are at work."""
        if self.busy:
            raise ArgumentError("warmup: sequences are at work; warm an engine up before the first is added")
        with locked(self.channel):
            self._held()
        for sampling in (GREEDY, Sampling(temperature=1.0)):
            for size in self.pieces:
                row = empty_cache(self.model, 1, self.length, self.kernels)
                with locked(self.channel):
                    logits, row = self._extend(row, np.zeros(size, np.int32), size if size <= self.length else 1)
            with locked(self.channel):
                self._join(logits, row, 0, sampling)
                self._advance(np.zeros(len(self._slots), bool), sampling.temperature > 0)
        jax.block_until_ready(self._rows)

    def _held(self) -> _Rows:
        """What the slots have; made anew after an error of the devices."""
        if self._rows is None:
            if self.channel is not None:
                if self.channel.mail is self._mail:  # its link went with a step that failed, maybe on some ranks alone
                    self.channel.reset()
                self._mail = self.channel.mail
            self._rows = _Rows.empty(self.model, len(self._slots), self.length, self.kernels)
        return self._rows

    def _stepped(self) -> list[tuple[_Sequence, Token]]:
        """Work on all sequences; what is known since it last returned, whatever interrupted it meanwhile."""
        try:
            self._drop_cancelled()
            with locked(self.channel):
                self._held()  # before anything takes a link that may have gone with what failed
                self._read_a_piece()
                self._dispatch()
            while self._flights and (len(self._flights) > self.ahead or not self._has_work()):
                self._take()
        except Exception:
            self._fail()
            raise
        found, self._found = self._found, []
        return found

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            sequence = self._live.get(self._cancelled.popleft())
            if sequence is None:
                continue
            with self._lock:
                if sequence in self._queue:
                    self._queue.remove(sequence)
            if self._reading and self._reading[0] is sequence:
                self._reading = None
            self._end(sequence, LOST, "cancelled")

    def _fail(self) -> None:
        """Nothing that the devices hold is sure any more: every sequence ends, and the rows are made anew for the next."""
        self._rows, self._reading = None, None
        self._flights.clear()
        with self._lock:
            lost = list(self._live.values())
            self._queue.clear()
        for sequence in lost:
            self._end(sequence, LOST, "failed")

    def _has_work(self) -> bool:
        """Whether something more can be dispatched now."""
        readable = self._reading or (self._queue and None in self._slots)
        return bool(readable) or any(s is not None and s.dispatched < s.most for s in self._slots)

    def _read_a_piece(self) -> None:
        """Read on in the prompt that is being read, or begin the next; one that is whole joins."""
        if self._reading is None:
            if not self._queue or None not in self._slots:
                return
            row = empty_cache(self.model, 1, self.length, self.kernels)
            self._reading = self._queue.popleft(), row, None
        sequence, row, logits = self._reading
        left = sequence.prompt[sequence.read :]
        if len(left):
            size = next((size for size in self.pieces if size >= len(left)), self.pieces[-1])
            count = min(size, len(left))
            logits, row = self._extend(row, np.pad(left[:count], (0, size - count)), count)
            sequence.read += count
            self._reading = sequence, row, logits
        if sequence.read == len(sequence.prompt):
            slot = self._slots.index(None)
            first = self._join(logits, row, slot, sequence.sampling)
            self._reading, self._slots[slot] = None, sequence
            self._sent(first, None, [(0, sequence)])

    def _dispatch(self) -> None:
        """One step of the slots that want a token."""
        live = [(slot, s) for slot, s in enumerate(self._slots) if s is not None and s.dispatched < s.most]
        if live:
            mask = np.zeros(len(self._slots), bool)
            mask[[slot for slot, _ in live]] = True
            tokens = self._advance(mask, any(s.sampling.temperature > 0 for _, s in live))
            self._sent(tokens, self.channel and self.channel.words(), live)

    def _sent(self, tokens: jax.Array, words: Any, sequences: list[tuple[int, _Sequence]]) -> None:
        for _, sequence in sequences:
            sequence.dispatched += 1
        self._flights.append((tokens, words, sequences))

    def _take(self) -> None:
        """Wait for the earliest tokens under way. Those of a sequence that had ended by then are nobody's."""
        tokens, words, sequences = self._flights[0]
        made = np.asarray(tokens)
        if self.channel is not None and words is not None:
            self.channel.hold(words)
        self._flights.popleft()  # not before they are here: the wait may be interrupted
        for at, sequence in sequences:
            if sequence.number in self._live:
                self._note(sequence, int(made[at]))

    def _note(self, sequence: _Sequence, token: int) -> None:
        """Keep a token, and free the slot where it was the last."""
        if token == LOST:
            self._end(sequence, LOST, "failed")
            return
        sequence.tokens.append(token)
        if token in sequence.stops:
            self._end(sequence, token, "stop")
        elif len(sequence.tokens) == sequence.most:
            self._end(sequence, token, "length")
        else:
            self._found.append((sequence, Token(sequence.number, token, None)))

    def _end(self, sequence: _Sequence, token: int, why: str) -> None:
        if sequence in self._slots:
            self._slots[self._slots.index(sequence)] = None
        del self._live[sequence.number]
        self._found.append((sequence, Token(sequence.number, token, why)))

    def _extend(self, row: Cache, tokens: np.ndarray, count: int) -> tuple[jax.Array, Cache]:
        return extend(self.model, tokens[None], np.array([count], np.int32), row, kernels=self.kernels)

    def _join(self, logits: jax.Array | None, row: Cache, slot: int, sampling: Sampling) -> jax.Array:
        drawn, how = sampling.temperature > 0, Draws.of([sampling])
        first, self._rows = _join(self.model, self._held(), logits, row, np.int32(slot), how, drawn=drawn, stacked=row.stacked)
        return first

    def _advance(self, live: np.ndarray, drawn: bool) -> jax.Array:
        rows, way = self._held(), self.channel and self.channel.link
        tokens, self._rows, link = _advance(self.model, rows, live, way, kernels=self.kernels, drawn=drawn)
        if self.channel is not None:
            self.channel.keep(link)
        return tokens


@partial(jax.tree_util.register_dataclass, data_fields=("cache", "tokens", "draws"), meta_fields=())
@dataclass(frozen=True)
class _Rows:
    """What the slots have on the devices: memories, the last token of each [B] int32, and how the next are drawn."""

    cache: Cache
    tokens: Any
    draws: Draws

    @classmethod
    def empty(cls, model: Model, slots: int, length: int, kernels: Kernels) -> _Rows:
        rest = np.zeros(slots, np.int32), Draws.of([GREEDY] * slots)
        return cls(empty_cache(model, slots, length, kernels), *jax.device_put(rest, NamedSharding(model.mesh, P())))


@partial(jax.jit, static_argnames=("drawn", "stacked"), donate_argnames=("rows",))
def _join(
    model: Model, rows: _Rows, logits: jax.Array, row: Cache, slot: Any, how: Draws, *, drawn: bool, stacked: bool
) -> tuple[jax.Array, _Rows]:
    """The first token of a prompt that was read into `row`, [1] int32, and the slots with that row among them."""
    first = draw(_everywhere(model, logits), how) if drawn else most_likely(model, logits)
    cache = jax.tree.map(
        lambda held, own, axis: lax.dynamic_update_slice_in_dim(held, own, slot, axis),
        rows.cache,
        row,
        _batch_axes(model, stacked),
    )
    tokens, draws = jax.tree.map(lambda held, own: held.at[slot].set(own[0]), (rows.tokens, rows.draws), (first, how.after()))
    return first, _Rows(cache, tokens, draws)


@partial(jax.jit, static_argnames=("kernels", "drawn"), donate_argnames=("rows", "link"))
def _advance(
    model: Model, rows: _Rows, live: Any, link: Link | None, *, kernels: Kernels, drawn: bool
) -> tuple[jax.Array, _Rows, Link | None]:
    """The next token of each live slot, [B] int32; the others compute with token 0 at place 0, which nobody reads.

    drawn: False where all take the likeliest. The link is a channel's, and the one after comes third.
    """
    held = rows.cache
    cache = Cache(held.deltas, held.attentions, jnp.where(live, held.lengths, 0))
    tokens = jnp.where(live, rows.tokens, 0)
    if drawn:
        logits, cache, *after = decode_step(model, tokens, cache, kernels=kernels, link=link)
        tokens = draw(_everywhere(model, logits), rows.draws)
    else:
        tokens, cache, *after = greedy_step(model, tokens, cache, kernels=kernels, link=link)
    return tokens, _Rows(cache, tokens, rows.draws.after()), after[0] if after else None


def _everywhere(model: Model, logits: jax.Array) -> jax.Array:
    return lax.with_sharding_constraint(logits, NamedSharding(model.mesh, P()))


def _batch_axes(model: Model, stacked: bool) -> Cache:
    """In a cache's place, the axis of each array along which its sequences lie."""
    one, two = (cache_shapes(model.config, model.mesh, batch, 8, model.dtype, stacked) for batch in (1, 2))
    return jax.tree.map(lambda a, b: next(i for i in range(a.ndim) if a.shape[i] != b.shape[i]), one, two)
