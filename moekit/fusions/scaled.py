"""Weights with one scale for each of their blocks, as FP8 checkpoints have them: how declarations and references read them."""

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import Value, blocks, contract, gather, iota, size, sum

STORED = ("float8_e4m3fn", "float32", "float16", "bfloat16")
BLOCK = 128


def scaled_product(
    x: Value, weight: Value, scale: Value, over: str, into: str, block: int, upto: Value | None = None
) -> Value:
    """x·(weight·scale) over an axis, block by block of it: each is multiplied as it is, scaled in float32, and added up.

    scale varies along the axis of blocks, the first of `into`, and along whatever else the product does. upto: so many blocks.
    """
    outer, inner = into.split()
    parts, kept = (blocks(a, over, block, into=into) for a in (x, weight))
    return sum(contract(parts, kept, over=inner) * scale, over=outer, upto=upto)


def of_rows(scale: Value, axis: str, over: str, block: int, half: int = 0) -> Value:
    """The scale of each element of `axis`, of which `block` neighbours share one along axis `over` of the scales.

    half: which of two matrices, one above the other in a weight, the elements are of.
    """
    need, name = -(-size(axis) // block), scale.builder.name
    if (count := size(over)) != need * (2 if "*" in over else 1):
        raise ShapeError(f"{name}: scale has {count} rows along {over}; {axis} = {size(axis)} in blocks of {block} needs {need}")
    return gather(scale, iota(axis) // block + half * need, over=over)


def whole(weight: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The weight [..., N, D] times its scales, in float64: what references multiply by."""
    n, d = weight.shape[-2:]
    spread = np.repeat(np.repeat(scale.astype(np.float64), rows, axis=-2), columns, axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return weight.astype(np.float64) * spread[..., :n, :d]


def halved(weight: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`whole` of a weight [..., 2N, D] of two matrices, one above the other, each with its own blocks of rows."""
    pairs = zip(*(np.split(a, 2, axis=-2) for a in (weight, scale)), strict=True)
    return np.concatenate([whole(*pair, rows, columns) for pair in pairs], axis=-2)
