"""What a choice of the k best may be where values have errors: which of them another implementation may rank otherwise."""

from __future__ import annotations

import numpy as np

from moekit.lang.dtypes import is_float
from moekit.lang.graph import Graph


def ranked(graph: Graph, keys: int) -> int | None:
    """The node of the floats whose bits are the keys of a top_k; None where they are an operand's, which has no errors."""
    while not is_float(graph.nodes[keys].dtype):
        keys = graph.nodes[keys].args[0]
    return keys if graph.nodes[keys].op != "read" else None


def unsure(keys: np.ndarray, error: np.ndarray, value: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Among the `count` best along an axis, best first, where another element may stand: the errors of values overlap there.

    keys: what is ranked; value, error: the floats that they are made of, and how far an implementation may be from those.
    """
    order = np.argsort(-keys.astype(np.int64), axis=axis, kind="stable")
    value, error = (np.broadcast_to(x, keys.shape) for x in (value, error))
    value, error = (np.moveaxis(np.take_along_axis(x, order, axis), axis, -1) for x in (value, error))
    value = np.where(np.isnan(value), -np.inf, value)  # last, as keys have it
    low, high = (np.where(np.isinf(error), side * np.inf, value + side * error) for side in (-1, 1))
    moves = error > 0
    clear = _least(low) >= _most(high)  # equal ones without errors stand by their number
    clear &= _least(np.where(moves, low, np.inf)) > _most(high)
    clear &= _least(low) > _most(np.where(moves, high, -np.inf))
    end = np.ones_like(moves[..., :1])
    edges = np.concatenate([end, clear, end], axis=-1)
    return np.moveaxis(~(edges[..., :-1] & edges[..., 1:])[..., :count], -1, axis)


def _least(x: np.ndarray) -> np.ndarray:
    """Of each element but the last, the least from the first to it."""
    return np.minimum.accumulate(x, axis=-1)[..., :-1]


def _most(x: np.ndarray) -> np.ndarray:
    """Of each element but the last, the largest of those after it."""
    return np.maximum.accumulate(x[..., ::-1], axis=-1)[..., ::-1][..., 1:]
