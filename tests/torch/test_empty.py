"""Reductions over no tokens: a sum is 0, a mean NaN, and of nothing there is no largest, whoever is asked."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moekit.torch as mt
from moekit import lang as ml
from moekit.errors import ShapeError
from moekit.jax import op as jax_op
from moekit.lang import In, fusion

X = np.zeros((0, 5), np.float32)


@fusion(None, x=In("T H"))
def totals(x):
    """What nothing adds up to, beside an output that has no elements."""
    x32 = ml.f32(x)
    return {
        "sum": ml.sum(x32, over="T"),
        "mean": ml.mean(x32, over="T"),
        "twice": x32 * 2.0,
        "dot": ml.contract(x, x, over="T"),
    }


@fusion(None, x=In("T H"))
def largest(x):
    """The largest of every column."""
    return ml.max(ml.f32(x), over="T")


@fusion(None, x=In("T H"))
def first(x):
    """Where the smallest of every column is."""
    return ml.argmin(ml.f32(x), over="T")


@fusion(None, x=In("T H"))
def below(x):
    """How far every element is below the largest of its column: an output without elements, of a maximum that is not there."""
    return ml.max(ml.f32(x), over="T") - ml.f32(x)


CALLS = {
    "eager": lambda f: mt.op(f)(torch.from_numpy(X), implementation="eager"),
    "triton": lambda f: mt.op(f)(torch.from_numpy(X), implementation="triton"),
    "xla": lambda f: jax_op(f)(jnp.asarray(X), implementation="xla"),
    "pallas": lambda f: jax_op(f)(jnp.asarray(X), implementation="pallas"),
}


@pytest.mark.parametrize("implementation", CALLS)
def test_sums_of_nothing(implementation, emulated):
    total, mean, twice, dot = (np.asarray(x) for x in CALLS[implementation](totals))
    assert total.shape == mean.shape == (5,)
    assert not total.any()
    assert np.isnan(mean).all()
    assert twice.shape == (0, 5)
    assert not dot.any()
    assert bool(emulated.front) == (implementation == "triton")


@pytest.mark.parametrize("implementation", CALLS)
@pytest.mark.parametrize("declared", [largest, first, below], ids=lambda f: f.name)
def test_the_largest_of_nothing(declared, implementation, emulated):
    with pytest.raises(ShapeError, match=rf"^{declared.name}: (max|min) over T needs at least one element, got T = 0"):
        CALLS[implementation](declared)
    assert not emulated.front
