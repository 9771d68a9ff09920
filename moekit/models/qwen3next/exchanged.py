"""A step's norms with the all-reduce before each in the same kernel: ranks send each other packets, where they can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from moekit.jax import Link, all_reduce_add_rms_norm, exchange
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
        given = {"eps": self.eps, "offset": 1.0, "tp": self.link.ranks, "door": self.door}
        (normed, residual), self.link = exchange(all_reduce_add_rms_norm, self.link, hidden, residual, weight, **given)
        return normed, residual


def unsummed(kernels: Kernels) -> Kernels:
    """The same kernels where nothing adds up over ranks but `Exchanged`."""
    return replace(kernels, all_reduce=_part)


def _part(x: jax.Array) -> jax.Array:
    return x
