"""Operand values by recipe and seed: never all zero, and each recipe tempts another mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import ml_dtypes
import numpy as np
from numpy.random import Generator

from moekit.lang.dtypes import is_float, numpy_dtype
from moekit.lang.fusion import Fusion


def _special(rng: Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Normal numbers with infinities, NaN and zeros of both signs here and there: some rows have none."""
    x = rng.standard_normal(shape)
    chosen = rng.random(shape) < 0.04
    x[chosen] = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0], int(chosen.sum()))
    return x


def _lowest(rng: Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Rows of -inf; in every second row one finite element."""
    x = np.full(shape, -np.inf)
    if x.size and x.ndim:
        rows = x.reshape(-1, shape[-1])
        rows[np.arange(0, len(rows), 2), rng.integers(0, shape[-1], len(rows[::2]))] = 1.0
    return x


def _nans(rng: Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Rows of NaN alone, as a CUDA graph's padding may hold; in every second row some numbers among them."""
    x = np.full(shape, np.nan)
    if x.size and x.ndim:
        few = max(1, shape[-1] // 8)
        for row in x.reshape(-1, shape[-1])[1::2]:
            row[rng.choice(shape[-1], few, replace=False)] = rng.standard_normal(few)
    return x


RECIPES: dict[str, Callable[[Generator, tuple[int, ...], str], np.ndarray]] = {
    "normal": lambda rng, shape, dtype: rng.standard_normal(shape),
    # Many ties, and sums that every order of addition gives exactly.
    "integers": lambda rng, shape, dtype: rng.integers(-3, 4, shape).astype(np.float64),
    # Around the smallest normal number, subnormals among them.
    "tiny": lambda rng, shape, dtype: rng.standard_normal(shape) * float(_limits(dtype).smallest_normal) * 4,
    # Up to a quarter of the largest number: sums stay finite, products may not.
    "huge": lambda rng, shape, dtype: rng.uniform(-0.25, 0.25, shape) * float(_limits(dtype).max),
    "special": _special,
    # Three values only, so that most elements have an equal.
    "ties": lambda rng, shape, dtype: rng.choice([-1.5, 0.0, 2.25], shape),
    # One value along each row.
    "equal": lambda rng, shape, dtype: np.broadcast_to(rng.standard_normal((*shape[:-1], 1) if shape else ()), shape),
    "lowest": _lowest,
    "nans": _nans,
    # Here and there a one: what divides by a sum or a norm meets eps alone.
    "zeros": lambda rng, shape, dtype: rng.choice([0.0, -0.0, 0.0, -0.0, 1.0], shape),
    # Magnitudes from 2^-12 to 2^6, so that sums cancel and small terms meet large ones.
    "mixed": lambda rng, shape, dtype: rng.standard_normal(shape) * np.exp2(rng.integers(-12, 7, shape)),
}


def _limits(dtype: str) -> Any:
    return ml_dtypes.finfo(numpy_dtype(dtype))


def make(recipe: str, shape: tuple[int, ...], dtype: str, rng: Generator) -> np.ndarray:
    """An array of `dtype` by recipe; integer dtypes get 0 to 3, whatever the recipe."""
    if not is_float(dtype):
        return rng.integers(0, 2 if dtype == "bool" else 4, shape).astype(numpy_dtype(dtype))
    with np.errstate(over="ignore"):
        return RECIPES[recipe](rng, shape, dtype).astype(numpy_dtype(dtype))


def shapes_of(
    fusion: Fusion, sizes: Mapping[str, int], params: Mapping[str, object] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of operands for the sizes of the plain axes; a dimension with `?` has size 1 where `sizes["NAME?"]` is 1.

    Axes of operands whose sizes follow from others and from `params` need not be said, nor parameters that none follows from.
    """
    own = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
    plain = dict(sizes)
    if own & {*fusion.axes} - {*sizes}:
        asked = {n for rule in fusion.axes.values() for n in signature(rule).parameters}
        free = {n: 0 for n, p in fusion.params.items() if p.default is p.empty and n not in asked}
        following = fusion.follow(sizes, fusion.bind_params(free | dict(params or {})))
        plain = {a: n for a, n in following.items() if a in own} | plain
    return {
        n: tuple(plain[f"{d.text}?"] if d.optional and f"{d.text}?" in plain else d.size(plain) for d in s.dims)
        for n, s in fusion.tensors.items()
    }


def operands(
    fusion: Fusion,
    sizes: Mapping[str, int],
    dtypes: str | Mapping[str, str] = "float32",
    recipe: str = "normal",
    seed: int = 0,
    params: Mapping[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """Operands of `fusion` for the sizes of its plain axes.

    `dtypes` is one dtype, for every operand that may have it (the others take the first they may have), or
    one by name. `sizes` and `params` are as in `shapes_of`.
    """
    rng, shapes = np.random.default_rng([seed, sum(sizes.values())]), shapes_of(fusion, sizes, params)
    arrays = {}
    for name, spec in fusion.tensors.items():
        wanted = dtypes if isinstance(dtypes, str) else dtypes.get(name, spec.dtypes[0])
        dtype = wanted if wanted in spec.dtypes else spec.dtypes[0]
        arrays[name] = make(recipe, shapes[name], dtype, rng)
    return arrays
