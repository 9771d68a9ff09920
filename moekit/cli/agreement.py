"""Whether Pallas's and XLA's kernels agree: by tokens in float32, by the logits of the same tokens where rounding is coarse.

In a narrow dtype two near-equal logits fall either way, and the tokens part though nothing is wrong. Both kinds are then fed
the same tokens, and so is a float32 run of the same weights. Both kinds round as often, almost everywhere at the same places,
so their errors against that run are of one size: Pallas's must not be larger than a small factor of XLA's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moekit.jax import Channel
from moekit.models.qwen3next import Cache, Generation, Model, decode_step, prefill
from moekit.models.qwen3next.exchanged import locked
from moekit.models.qwen3next.generate import padded
from moekit.models.qwen3next.kernels import Kernels, resolve

WHOLE, ROW = 1.5, 3.0  # times XLA's error that Pallas's may be: of all rows together, and of the worst row


@dataclass(frozen=True)
class Difference:
    """Where two runs part: the sequence, the position among its new tokens, and the token of each."""

    sequence: int
    position: int
    tokens: tuple[int | None, int | None]


@dataclass(frozen=True)
class Closeness:
    """Root mean square errors of the logits against a float32 run, of both kinds fed the same tokens.

    fused, xla: of all rows, and of the worst row. rows: how many were compared. ulp: what rounding the last hidden state
    once brings, which is allowed in any case.
    """

    fused: tuple[float, float]
    xla: tuple[float, float]
    rows: int
    ulp: float

    @property
    def bounds(self) -> tuple[float, float]:
        """What the fused kernels' errors may be."""
        return max(WHOLE * self.xla[0], self.ulp), max(ROW * self.xla[1], self.ulp)

    @property
    def within(self) -> bool:
        """Whether they are; NaN is not."""
        return all(error <= bound for error, bound in zip(self.fused, self.bounds, strict=True))


def difference(a: Generation, b: Generation) -> Difference | None:
    """The first place where two runs of the same prompts chose different tokens, or one of them had ended (None)."""
    for i, (left, right) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        for j in range(max(len(left), len(right))):
            pair = tuple(row[j] if j < len(row) else None for row in (left, right))
            if pair[0] != pair[1]:
                return Difference(i, j, (pair[0], pair[1]))
    return None


def closeness(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    kind: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    channel: Channel | None = None,
) -> Closeness:
    """Feed each prompt and its new tokens to kernels of a kind, XLA's and a float32 run, and compare the logits before each.

    channel: by which the ranks' parts of the kernels of that kind add up.
    """
    total = max(map(len, tokens))
    ids, lengths, room = padded(prompts, total)
    fed = np.zeros((len(tokens), total), np.int32)
    live = np.arange(total) < np.array([len(row) for row in tokens])[:, None]
    fed[live] = [token for row in tokens for token in row]
    sides = {"fused": (model, prefill, decode_step), "xla": (model, prefill, decode_step)}
    sides["wide"] = (model, _wide_prefill, _wide_step)
    memories: dict[str, Cache] = {}
    found = []
    for at in range(total):
        logits = {}
        for side, (own, fill, step) in sides.items():
            kernels = resolve(kind if side == "fused" else "xla")
            with locked(channel):
                by = {"link": channel.link} if channel is not None and side == "fused" and at else {}
                made = (
                    step(own, fed[:, at - 1], memories[side], kernels=kernels, **by)
                    if at
                    else fill(own, ids, lengths, cache_length=room, kernels=kernels)
                )
                logits[side], memories[side], *after = jax.block_until_ready(made)  # virtual devices meet in one program
                if channel is not None and after:
                    channel.keep(after[0])
        found.append([np.asarray(error) for error in _errors(logits["fused"], logits["xla"], logits["wide"])])
        progress(at + 1, total)
    fused, xla, size = np.array(found).transpose(1, 2, 0)[:, live]
    of_fused, of_xla = ((float(np.sqrt(np.mean(e**2))), float(e.max())) for e in (fused, xla))
    return Closeness(of_fused, of_xla, int(live.sum()), float(jnp.finfo(model.dtype).eps * np.sqrt(np.mean(size**2))))


def _widened(model: Model) -> Model:
    return Model(jax.tree.map(lambda a: a.astype(jnp.float32), model.params), model.config, model.mesh)


@partial(jax.jit, static_argnames=("cache_length", "kernels"))
def _wide_prefill(model: Model, tokens: jax.Array, lengths: jax.Array, *, cache_length: int, kernels: Kernels):
    return prefill(_widened(model), tokens, lengths, cache_length=cache_length, kernels=kernels)


@partial(jax.jit, static_argnames=("kernels",), donate_argnames=("cache",))
def _wide_step(model: Model, tokens: jax.Array, cache: Cache, *, kernels: Kernels):
    return decode_step(_widened(model), tokens, cache, kernels=kernels)


@jax.jit
def _errors(fused: jax.Array, xla: jax.Array, wide: jax.Array) -> list[jax.Array]:
    """Root mean squares of each row: of both kinds' errors, and of the float32 logits."""
    return [jnp.sqrt(jnp.mean(each**2, axis=-1)) for each in (fused - wide, xla - wide, wide)]
