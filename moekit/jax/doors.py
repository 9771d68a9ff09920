"""By what moekit's kernels get into a JAX program: Pallas's Triton lowering, or where it is not there, XLA's Triton itself."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import jax

from moekit.jax import launch, ttir

DOORS = ("pallas", "triton")  # the first that is there is taken
KERNELS = ("pallas", "pallas-triton", "triton", "mosaic")  # `pallas` is the faster of its two ways, where it is known


def refusal(door: str) -> str | None:
    """Why kernels cannot go this way here; None where they can."""
    if door in ("pallas", "pallas-triton"):
        return None if launch.plt else f"jax {jax.__version__} has no jax.experimental.pallas.triton"
    if door == "mosaic" and not find_spec("jax.experimental.pallas.mosaic_gpu"):
        return f"jax {jax.__version__} has no Mosaic GPU"
    if door == "mosaic":
        here = launch.plt or jax.default_backend() == "gpu"
        return None if here else f"jax {jax.__version__} has no jax.experimental.pallas.triton, and on a CPU loads go by that"
    return ttir.unavailable()


def gpu() -> str:
    """The name of the GPU that JAX computes on; empty where it computes on none."""
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""


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
