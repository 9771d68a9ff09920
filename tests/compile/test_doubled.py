"""A value that is read twice is looked at once: compiling takes no longer for each further time that something is doubled."""

import numpy as np
from programs import graph_of, planned

from moekit.compile.rules import heuristic
from moekit.compile.tile.interpret import run as execute
from moekit.lang import In, f32, fusion, gather, sum

TIMES = 60  # with twice the work for each, nothing here would ever end


@fusion(x=In("T H"))
def added_up(x):
    """A sum along a ragged block of what is doubled."""
    x = f32(x)
    for _ in range(TIMES):
        x = x + x
    return sum(x, over="H")


@fusion(x=In("T H"), ids=In("T", dtype="int32"))
def looked_up(x, ids):
    """Elements by what is doubled."""
    for _ in range(TIMES):
        ids = ids + ids
    return gather(x, ids, over="H")


@fusion(x=In("T K", dtype="int32"))
def counted(x):
    """A table of what is doubled."""
    for _ in range(TIMES):
        x = x + x
    counts = sum(x > 0, over="T")
    return x * counts


def test_what_is_added_up():
    """Powers of two round nothing."""
    x = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32)
    graph, out = graph_of(added_up, {"x": x.shape}, "float32"), np.full(5, np.nan, np.float32)
    execute(planned(graph), {"x": x, "out": out}, {"T": 5})
    np.testing.assert_allclose(out, x.astype(np.float64).sum(1) * 2.0**TIMES, rtol=1e-5)


def test_what_is_looked_up():
    """Integers wrap, here to nothing."""
    x = np.random.default_rng(4).standard_normal((5, 40)).astype(np.float32)
    ids, out = np.arange(5, dtype=np.int32) + 7, np.full(5, np.nan, np.float32)
    graph = graph_of(looked_up, {"x": x.shape, "ids": ids.shape}, {"x": "float32"})
    execute(planned(graph), {"x": x, "ids": ids, "out": out}, {"T": 5})
    np.testing.assert_array_equal(out, x[:, 0])


def test_what_is_counted():
    """What rules ask of a graph, too."""
    assert " stage:counts then " in str(heuristic(graph_of(counted, {"x": (5, 3)}, {})))
