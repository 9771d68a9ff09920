"""Operands that are cut over a mesh whose axes are explicit: JAX types say how, and array evaluation keeps to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from moekit.jax.view import View


def axes_cut(views: Iterable[View]) -> tuple[str, ...]:
    """The explicit mesh axes over which the bases of some views are cut, each once."""
    return tuple(dict.fromkeys(a for v in views for entry in jax.typeof(v.base).sharding.spec for a in _names(entry)))


def automatically(function: Callable, bases: Any, outs: Mapping[str, PartitionSpec]) -> dict[str, jax.Array]:
    """`function(bases)`, a dict, where XLA decides how the values inside lie; its results lie as `outs` says."""
    meshes = (jax.typeof(b).sharding.mesh for b in jax.tree.leaves(bases))
    mesh = next(m for m in meshes if not m.empty)
    explicit = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    run: Any = auto_axes(function, axes=explicit, out_sharding={n: NamedSharding(mesh, s) for n, s in outs.items()})
    return run(bases)


def kept(operands: Iterable[tuple[Sequence[str], View]], axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """How a new array over named axes lies: each axis as the first operand that is cut along it, where that divides it evenly.

    `operands` pairs the names of an operand's axes with its View.
    """
    cut: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for named, v in operands:
        sharding = jax.typeof(v.base).sharding
        sizes |= dict(sharding.mesh.shape)
        for name, axis in zip(named, v.axes, strict=True):
            cut[name] = cut.get(name) or sharding.spec[axis]
    entries: list[Any] = []
    for name, n in zip(axes, shape, strict=True):
        over = _names(cut.get(name))
        used = {a for entry in entries for a in _names(entry)}
        entries.append(cut[name] if over and not used & {*over} and n % prod(sizes[a] for a in over) == 0 else None)
    return PartitionSpec(*entries)


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
