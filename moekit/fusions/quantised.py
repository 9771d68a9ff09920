"""Rows in float8, with a scale for each block of their columns: what products of float8 with float8 take."""

import numpy as np

from moekit.fusions.scaled import BLOCK, counted
from moekit.lang import In, Out, Value, abs, blocks, cast, f32, float8_e4m3fn, fusion, max, maximum, round_to
from moekit.lang.dtypes import LARGEST

MOST = LARGEST[float8_e4m3fn]
SMALLEST = 2.0**-64  # a scale: blocks of nothing have one, too, and its product with a weight's is a normal number


def reference(x, columns):
    """float64, block by block; what is past the end of a last block is zero."""
    blocks = -(-x.shape[-1] // columns)
    parts = np.zeros((*x.shape[:-1], blocks * columns))
    parts[..., : x.shape[-1]] = x.astype(np.float64)
    codes, scale = coded(parts.reshape(*x.shape[:-1], blocks, columns))
    return {"codes": codes, "scale": scale[..., 0]}


def coded(parts):
    """Blocks along the last axis as numbers of float8, in float64, and the scale of each."""
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.maximum(np.abs(parts).max(-1, keepdims=True, initial=0.0) / 448, 2.0**-64)
        return round_to(parts / scale, "float8_e4m3fn"), scale


def scaled(parts: Value, over: str) -> tuple[Value, Value]:
    """Blocks as float8 codes, and the float32 scale of each: the largest magnitude along an axis is the largest number.

    NaN, or an infinity, makes its block's product NaN.
    """
    scale = maximum(max(abs(parts), over=over) * (1 / MOST), SMALLEST)  # a product has the same bits everywhere
    return cast(parts / scale, float8_e4m3fn), scale


def columns_of(columns):
    """Elements of a block."""
    return columns


@fusion(
    reference,
    x=In("T D"), codes=Out("T Db Di"), scale=Out("T Db"),
    dynamic="T", axes={"Db": counted("D", "columns"), "Di": columns_of},
)  # fmt: skip
def quantised(x, columns: int = BLOCK):
    """x [T, D] -> codes [T, Db, columns] in float8_e4m3fn and scale [T, Db] float32, Db = ⌈D/columns⌉: codes·scale is near x.

    A scale is its block's largest magnitude / 448, or 2^-64 where that is less; quotients are rounded to nearest, ties to even.
    Past the end of a last block codes are zero. A block with an infinity or NaN has NaN for it, and products with it are NaN.
    """
    codes, scale = scaled(f32(blocks(x, "D", columns, into="Db Di")), "Di")
    return {"codes": codes, "scale": scale}
