"""By what moekit's kernels get into a JAX program: Pallas's Triton lowering, or where it is not there, XLA's Triton itself."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import jax

from moekit.jax import launch, ttir

DOORS = ("pallas", "triton")  # the first that is there is taken
KERNELS = (*DOORS, "mosaic")  # the last by its name only, for what is printed for it


def refusal(door: str) -> str | None:
    """Why kernels cannot go this way here; None where they can."""
    if door == "pallas":
        return None if launch.plt else f"jax {jax.__version__} has no jax.experimental.pallas.triton"
    if door == "mosaic":
        return None if find_spec("jax.experimental.pallas.mosaic_gpu") else f"jax {jax.__version__} has no Mosaic GPU"
    return ttir.unavailable()


@cache
def best() -> str:
    """The first door that is there, and "xla", which is said once, where none is."""
    refused = []
    for door in DOORS:
        why = refusal(door)  # asked of one door after the other, as the second imports triton
        if why is None:
            return door
        refused.append(why)
    warnings.warn(f"moekit.jax: no kernels, array evaluation serves: {'; '.join(refused)}", stacklevel=2)
    return "xla"
