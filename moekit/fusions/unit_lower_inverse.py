"""Inverses of small triangular matrices, row after row: what tokens of a chunk of the gated delta rule make of each other."""

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import In, f32, fusion, gather, iota, size, sum, where

MOST = 64  # rows, each of which is code of its own


def reference(system):
    """float64, a column of the identity after the other."""
    n = system.shape[-1]
    solved = np.zeros(system.shape)
    for i in range(n):
        solved[:, i, i] = 1.0
        for j in range(i):
            solved[:, i] -= system[:, i, j, None].astype(np.float64) * solved[:, j]
    return {"out": solved}


@fusion(reference, system=In("T Lr Lc"))
def unit_lower_inverse(system):
    """The inverses of the identity plus what stands below the diagonal of each matrix: system [T, n, n] -> out, float32.

    What stands on the diagonal and above it is not looked at. Forward substitution in float32: n is at most 64.
    """
    if size("Lr") != size("Lc"):
        raise ShapeError(f"unit_lower_inverse: system has {size('Lr')} rows and {size('Lc')} columns; it must be square")
    if size("Lr") > MOST:
        raise ShapeError(f"unit_lower_inverse: system has {size('Lr')} rows; a call takes at most {MOST}")
    row, column = iota("Lr"), iota("Lc")
    solved = where(row == column, 1.0, 0.0)
    if size("Lr") <= 1:
        return where(row > 0, f32(system), solved)  # for each matrix, though it is not looked at
    for i in range(1, size("Lr")):
        below = where(row < i, f32(gather(gather(system, i, over="Lr"), row, over="Lc")), 0.0)  # what row i has, along rows
        solved = where(row == i, where(column == i, 1.0, 0.0) - sum(below * solved, over="Lr"), solved)
    return solved
