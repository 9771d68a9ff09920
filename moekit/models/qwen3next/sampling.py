"""Sampling on the device: temperature, then the k likeliest, then the fewest whose probabilities sum to p.

A draw follows from the logits, a sequence's seed and how many tokens it has made, and from nothing else: not from where it
stands in a batch, nor from the others there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moekit.errors import ArgumentError
from moekit.models.qwen3next.checks import LOST
from moekit.models.qwen3next.files import brief


@dataclass(frozen=True)
class Sampling:
    """How a sequence's tokens are chosen.

    temperature: 0 takes the likeliest. top_k: draw among so many, all where 0. top_p: among the likeliest whose
    probabilities just reach it. seed: 32 bits. Raises ArgumentError for values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind, least, most, needed in (
            ("temperature", Real, 0, float(np.finfo(np.float32).max), "a float32 number of at least 0"),
            ("top_k", Integral, 0, 2**31 - 1, "an integer from 0 to 2³¹ - 1"),
            ("top_p", Real, 0, 1, "a number above 0 and at most 1"),
            ("seed", Integral, 0, 2**32 - 1, "an integer of 32 bits"),
        ):
            value = getattr(self, name)
            numeric = isinstance(value, kind) and not isinstance(value, bool)
            if not (numeric and least <= getattr(self, name) <= most) or (name == "top_p" and value == 0):
                raise ArgumentError(f"sampling: {name} is {brief(value)}; it must be {needed}")


GREEDY = Sampling()


@partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_k", "top_p", "seed", "made"), meta_fields=())
@dataclass(frozen=True)
class Draws:
    """Sampling of several sequences, each field [B]; made: the tokens that each has."""

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    made: Any

    @classmethod
    def of(cls, each: list[Sampling]) -> Draws:
        """For sequences that have no token yet."""
        return cls(
            np.array([one.temperature for one in each], np.float32),
            np.array([one.top_k for one in each], np.int32),
            np.array([one.top_p for one in each], np.float32),
            np.array([one.seed for one in each], np.uint32),
            np.zeros(len(each), np.int32),
        )

    def after(self) -> Draws:
        """For their next tokens."""
        return Draws(self.temperature, self.top_k, self.top_p, self.seed, self.made + 1)


def draw(logits: jax.Array, how: Draws) -> jax.Array:
    """A token of each row of logits [B, V] float32: [B] int32; LOST where a logit is NaN or infinite.

    Of equal logits at the edge of `top_k` or `top_p` all are kept.
    """
    above = logits - logits.max(axis=1, keepdims=True)  # at most 0: no temperature makes an infinity of the likeliest
    scaled = above / jnp.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    ranked = -jnp.sort(-scaled, axis=1)
    count = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, logits.shape[1]), logits.shape[1])
    kept = jnp.arange(logits.shape[1])[None] < count[:, None]
    shares = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=1)
    kept &= (jnp.cumsum(shares, axis=1) - shares < how.top_p[:, None]).at[:, 0].set(True)  # what likelier ones have before it
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=1, keepdims=True)
    drawn = jnp.argmax(jnp.where(scaled >= least, scaled + _noise(how, logits.shape[1]), -jnp.inf), axis=1)
    chosen = jnp.where(how.temperature > 0, drawn, jnp.argmax(logits, axis=1)).astype(jnp.int32)
    return jnp.where(jnp.isfinite(logits).all(axis=1), chosen, LOST)


def _noise(how: Draws, size: int) -> jax.Array:
    """Gumbel noise [B, size]: the largest of logits plus noise is a draw from their softmax."""

    def one(seed: jax.Array, made: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), made), (size,))

    return jax.vmap(one)(how.seed, how.made)
