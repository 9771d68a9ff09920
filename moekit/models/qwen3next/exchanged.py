"""A step's norms with the all-reduce before each in the same kernel: ranks send each other packets, where they can."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from moekit.compile.rules.rows import BY_PACKETS
from moekit.errors import ArgumentError, RankError, UnavailableError
from moekit.fusions.added import added
from moekit.jax import Channel, Link, all_reduce_add_rms_norm, exchange
from moekit.jax.doors import best
from moekit.jax.face import op
from moekit.models.qwen3next.kernels import Kernels


class Exchanged:
    """The norm of a model's layers, called with one rank's part of what is added to the residual stream.

    The first call of a step has no part, but what every rank has: its embeddings. `link` is the one after the last call.
    `door`: by what kernels get into the program (moekit/jax/doors.py).
    """

    def __init__(self, norm: Callable[..., Any], link: Link, eps: float, door: str):
        self.norm, self.link, self.eps, self.door, self.begun = norm, link, eps, door, False

    def __call__(self, hidden: jax.Array, residual: jax.Array, weight: Any) -> tuple[jax.Array, jax.Array]:
        if not self.begun:
            self.begun = True
            return self.norm(hidden, residual, weight)
        given = {"eps": self.eps, "offset": 1.0, "tp": self.link.ranks}
        given["door"] = self.door
        (normed, residual), self.link = exchange(all_reduce_add_rms_norm, self.link, hidden, residual, weight, **given)
        return normed, residual


class Gathered:
    """A gather of a few numbers of each row [n, T] to every rank, [ranks, n, T], by the packets of a sum.

    A rank's row has zeros where the others' numbers go, to which nothing is added but zeros: all come as they are, but for the
    sign of -0. `link` is the one after the last call. `door` as `Exchanged` has it.
    """

    def __init__(self, link: Link, door: str):
        self.link, self.door = link, door

    def __call__(self, x: jax.Array) -> jax.Array:
        ranks, (count, rows) = self.link.ranks, x.shape
        own = jnp.arange(ranks)[:, None] == lax.axis_index(self.link.axis)
        mine = jnp.where(own, x.T[:, None], 0).reshape(rows, ranks * count)
        every, self.link = exchange(op(added), self.link, mine, tp=ranks, door=self.door)
        return every.reshape(rows, ranks, count).transpose(1, 2, 0)


def unsummed(kernels: Kernels) -> Kernels:
    """The same kernels where nothing adds up over ranks but `Exchanged`."""
    return replace(kernels, all_reduce=_part)


@cache
def channel_of(mesh: Mesh, rows: int, width: int, kernels: str | None) -> tuple[Channel | None, str]:
    """By what the ranks of a decode step of `rows` rows of `width` elements send each other packets, or None; and what adds up
    for them, in words. Calls that ask for the same share a channel.
    """
    if mesh.size == 1:
        return None, "one rank adds up nothing"
    kernels = kernels or best()
    if kernels == "xla":
        return None, f"psum, as --kernels is {kernels}"
    if rows > BY_PACKETS:
        return None, f"psum: {rows} rows are more than the {BY_PACKETS} up to which packets take less time"
    try:
        channel = Channel(mesh, rows=rows, width=width)
    except (RankError, UnavailableError) as error:
        return None, f"psum: {error}"
    if rows > (most := channel.link.resident):
        return None, f"psum: {rows} rows wait for each other, of which a device has {most} at once"
    return channel, "one kernel with the norm behind it, by packets"


def check_channel(channel: Channel, mesh: Mesh, width: int, rows: int, who: str, of: str) -> None:
    """Raise ArgumentError for a channel by which the rows of a step cannot go."""
    if channel.mesh != mesh:
        raise ArgumentError(f"{who}: the channel is of another mesh than the model; make one of model.mesh")
    most = min(channel.rows, channel.link.resident)
    if rows > most or width > channel.width:
        raise ArgumentError(
            f"{who}: {rows} {of} of {width} elements where the channel serves {most} rows of {channel.width}; make a channel "
            f"with room for them or ask for fewer {of}"
        )


def locked(channel: Channel | None) -> AbstractContextManager[Any]:
    """What is held while programs are dispatched in which ranks wait for each other."""
    return nullcontext() if channel is None else channel.lock


def _part(x: jax.Array) -> jax.Array:
    return x
