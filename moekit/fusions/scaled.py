"""Weights with one scale for each of their blocks, as FP8 checkpoints have them: how declarations and references read them."""

from collections.abc import Callable
from inspect import Parameter, Signature

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import Value, blocks, contract, gather, iota, size, sum

STORED = ("float8_e4m3fn", "float32", "float16", "bfloat16")
BLOCK = 128


def counted(axis: str, block: str) -> Callable[..., int]:
    """The rule of an axis of scales: how many blocks an axis has, of as many elements as a static parameter says."""

    def rule(**known: int) -> int:
        if known[block] < 1:
            raise ShapeError(f"{block} = {known[block]}; blocks have 1 element or more")
        return -(-known[axis] // known[block])

    kinds = Parameter.KEYWORD_ONLY
    rule.__signature__ = Signature([Parameter(axis, kinds), Parameter(block, kinds)])
    return rule


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
    return gather(scale, iota(axis) // block + half * -(-size(axis) // block), over=over)


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
