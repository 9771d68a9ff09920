"""The gated delta rule over whole sequences, in chunks: products of all chunks at once.

Formula: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024), section 3.3. What a chunk makes of a state is a product and a
sum, and two in a row are again; so the states between chunks are a prefix sum (Blelloch 1990).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moekit.models.qwen3next.numerics import product

CHUNK = 64
LONG = 1024  # tokens from which on chunks are twice as long: fewer states, which are what there is most of
IN_TURN = 8  # up to so many groups of chunks are gone through one after the other
BLOCK = 16  # rows and columns of a system that are solved at once


Times = Callable[..., jax.Array]  # a product, by its subscripts
Solve = Callable[[jax.Array], jax.Array]  # `inverse` of systems of at most BLOCK rows


def chunked_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    beta: jax.Array,
    state: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    solve: Solve | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over sequences, in chunks of tokens, from a state, zero where None, in float32.

    q, k [B, S, K, Dk]; v [B, S, V, Dv]; decay (log, at most 0), beta [B, S, V]; scales: what q and k are to be multiplied by,
    [B, S, K] each, 1 where None -> read [B, S, V, Dv], state [B, V, Dk, Dv], float32. Value head h reads key head h·K // V.
    Scales stand beside q and k so that these may be narrow: they are the operands of most products. Where they are, products of
    float32 are of three of its parts (`numerics.product`); where they are float32 themselves, IEEE. solve: see `inverse`.
    """
    times = partial(_times, exact=k.dtype == jnp.float32)
    batch, length, heads, _ = v.shape
    ratio, order = heads // k.shape[2], _Order(batch, length)
    ones = jnp.ones(k.shape[:3], jnp.float32)
    of_q, of_k = (order.chunks(jnp.repeat(a, ratio, axis=2)) for a in scales or (ones, ones))
    decay, beta = order.chunks(decay), order.chunks(beta)
    halves = partial(jnp.array_split, indices_or_sections=2 if order.sides[1] else 1)  # at even and at odd places
    q, k, v = (order.chunks(a) for a in (q, k, v))
    # Behind a barrier: else XLA makes wide ones for products.
    q, k, keys, values = lax.optimization_barrier((q, k, halves(_of_values(k, ratio)), halves(v)))

    total = jnp.cumsum(decay, axis=-1)  # log of the decay since the chunk began
    lower = jnp.tril(jnp.ones((order.chunk, order.chunk), bool))
    between = jnp.exp(jnp.where(lower[None], total[..., :, None] - total[..., None, :], -jnp.inf)) * of_k[..., None, :]
    system = _of_values(times("btd,bsd->bts", k, k), ratio) * between * (of_k * beta)[..., None]
    attend = _of_values(times("btd,bsd->bts", q, k), ratio) * between * of_q[..., None]

    # What a chunk adds to the state, and what it reads, is made of its v and of the state before it, which goes by its k.
    solved = inverse(system, times, solve) * beta[..., None, :]
    since, left = of_k * jnp.exp(total), of_k * jnp.exp(total[..., -1:] - total)
    to_state, to_read = solved * left[..., None], times("bij,bjk->bik", attend, solved)
    fade = jnp.exp(total[:, -1])[:, None, None] * jnp.eye(k.shape[-1], dtype=jnp.float32)[None]
    asked = _of_values(q, ratio).astype(jnp.float32) * (of_q * jnp.exp(total))[..., None]
    by_key, reads_key = (halves(a * since[..., None, :]) for a in (to_state, to_read))
    # In halves, as the sum over chunks takes them: halves of products would be copied.
    kept = _each(times, "bti,btj->bij", keys, _each(times, "bts,bsd->btd", by_key, keys))
    kept = [a - b for a, b in zip(halves(fade), kept, strict=True)]
    added = _each(times, "bti,btj->bij", keys, _each(times, "bts,bsd->btd", halves(to_state), values))
    if state is None:
        state = jnp.zeros((batch, heads, *added[0].shape[1:]), jnp.float32)
    states, after = _between(kept, added, state.reshape(-1, *added[0].shape[1:]), order.sides[1], times)
    asked = [a - b for a, b in zip(halves(asked), _each(times, "bts,bsd->btd", reads_key, keys), strict=True)]
    read = zip(_each(times, "btk,bkv->btv", asked, states), _each(times, "bts,bsd->btd", halves(to_read), values), strict=True)
    return order.tokens(jnp.concatenate([a + b for a, b in read])), after.reshape(state.shape)


def _times(subscripts: str, *operands: jax.Array, exact: bool) -> jax.Array:
    """A product of its own: of two that share an operand XLA makes one, and copies operands and parts."""
    return product(subscripts, *lax.optimization_barrier(operands), exact=exact)


def _each(times: Times, subscripts: str, *operands: list[jax.Array]) -> list[jax.Array]:
    return [times(subscripts, *some) for some in zip(*operands, strict=True)]


@dataclass(frozen=True)
class _Order:
    """In which order chunks stand: of a sequence's chunk g·2ⁿ + i in group g, first the bits of i, the lowest first, then g.

    So the chunks at even places are the first half, and of these those of every fourth place. Behind g are sequence and head.
    """

    batch: int
    length: int

    @property
    def chunk(self) -> int:
        """Tokens in a chunk, a power of two."""
        return min(CHUNK if self.length < LONG else 2 * CHUNK, 1 << (self.length - 1).bit_length())

    @property
    def sides(self) -> tuple[int, int]:
        """(groups, n): there are groups of 2ⁿ chunks."""
        groups, n = -(-self.length // self.chunk), 0
        while groups > IN_TURN or (groups > 1 and groups % 2 == 0):
            groups, n = -(-groups // 2), n + 1
        return groups, n

    def chunks(self, a: jax.Array) -> jax.Array:
        """[B, S, heads, ...] -> [chunks, c, ...], the end padded with zeros."""
        groups, n = self.sides
        if missing := (groups << n) * self.chunk - self.length:
            a = jnp.pad(a, ((0, 0), (0, missing)) + ((0, 0),) * (a.ndim - 2))
        a = a.reshape(self.batch, groups, *(2,) * n, self.chunk, *a.shape[2:])
        a = jnp.transpose(a, (*range(n + 1, 1, -1), 1, 0, n + 3, n + 2, *range(n + 4, a.ndim)))
        return a.reshape(-1, *a.shape[n + 3 :])

    def tokens(self, a: jax.Array) -> jax.Array:
        """[chunks, c, D] -> [B, S, heads, D]."""
        groups, n = self.sides
        a = a.reshape(*(2,) * n, groups, self.batch, -1, *a.shape[1:])
        a = jnp.transpose(a, (n + 1, n, *range(n - 1, -1, -1), n + 3, n + 2, n + 4))
        return a.reshape(self.batch, -1, *a.shape[n + 3 :])[:, : self.length]


def _of_values(a: jax.Array, ratio: int) -> jax.Array:
    """What is of key heads [chunks, ...], for each of a head's value heads."""
    return jnp.broadcast_to(a[:, None], (a.shape[0], ratio, *a.shape[1:])).reshape(-1, *a.shape[1:])


def inverse(system: jax.Array, times: Times, solve: Solve | None = None) -> jax.Array:
    """Of the identity plus what stands below the diagonal of system [N, n, n], n a power of two; what stands above is zero.

    By halves: what is added up is then never larger than what comes of it, as powers of the system may be. solve: what takes
    the small ones, products where None.
    """
    size = system.shape[-1]
    if size <= BLOCK:
        return solve(system) if solve else _small(system, times)
    half = size // 2
    corners = jnp.concatenate([system[:, :half, :half], system[:, half:, half:]])
    first, second = jnp.split(inverse(corners, times, solve), 2)
    below = -times("bij,bjk->bik", second, times("bij,bjk->bik", system[:, half:, :half], first))
    upper, lower = jnp.concatenate([first, jnp.zeros_like(below)], axis=2), jnp.concatenate([below, second], axis=2)
    return jnp.concatenate([upper, lower], axis=1)


def _small(system: jax.Array, times: Times) -> jax.Array:
    """`inverse` with all of a system in every product: of blocks along the diagonal of one, two, four rows and so on."""
    size, at = system.shape[-1], np.arange(system.shape[-1])
    solved, block = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape), 1
    while block < size:
        row, column = at[:, None] // block, at[None] // block
        below = jnp.where(((row % 2 == 1) & (column == row - 1))[None], system, 0.0)
        if block > 1:
            below = times("bij,bjk->bik", solved, times("bij,bjk->bik", below, solved))
        solved, block = solved - below, 2 * block
    return solved


def _between(
    kept: list[jax.Array], added: list[jax.Array], state: jax.Array, pairs: int, times: Times
) -> tuple[list[jax.Array], jax.Array]:
    """The state before each chunk, in parts like those given, and that after all; a chunk makes kept · state + added of one.

    kept [chunks, Dk, Dk], added [chunks, Dk, Dv] in `_Order`; state [B·V, Dk, Dv] before the first. pairs: how often two
    neighbours in time are the two halves of what is left: if so, they are given apart.
    """
    if pairs:
        (first, then), (some, more) = kept, added
        both = times("bij,bjk->bik", then, first), times("bij,bjk->bik", then, some) + more
        begun, state = _between(*(jnp.array_split(a, 2 if pairs > 1 else 1) for a in both), state, pairs - 1, times)
        before = jnp.concatenate(begun)
        return [before, times("bij,bjk->bik", first, before) + some], state
    states = []
    for one, more in zip(*(a.reshape(-1, state.shape[0], *a.shape[1:]) for a in (*kept, *added)), strict=True):
        states.append(state)
        state = times("bij,bjk->bik", one, state) + more
    return [jnp.concatenate(states)], state
