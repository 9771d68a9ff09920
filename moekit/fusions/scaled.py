"""Weights with one scale for each of their blocks, as FP8 checkpoints have them: how declarations and references read them."""

from collections.abc import Callable
from inspect import Parameter, Signature

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import Value, blocks, contract, f32, gather, iota, size, sum

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


def products(
    x: Value, weight: Value, scale: Value | None, over: str, into: str, block: int, upto: Value | None = None
) -> Value:
    """x·(weight·scale) over an axis, block by block of it: each is multiplied as it is, scaled in float32, and added up.

    scale varies along the axis of blocks, the first of `into`, and along whatever else the product does; a weight that has
    none, beside others that do, is multiplied in the same blocks. upto: so many blocks.
    """
    outer, inner = into.split()
    parts, kept = (blocks(a, over, block, into=into) for a in (x, weight))
    each = contract(parts, kept, over=inner)
    return sum(each if scale is None else each * scale, over=outer, upto=upto)


def sums(x: Value, weight: Value, scale: Value | None, over: str, into: str, block: int) -> Value:
    """`products` that lanes multiply and not the matrix unit: for one row, which that would have to be filled up for."""
    outer, inner = into.split()
    parts, kept = (f32(blocks(a, over, block, into=into)) for a in (x, weight))
    each = sum(parts * kept, over=inner)
    return sum(each if scale is None else each * scale, over=outer)


def of_rows(scale: Value, axis: str, over: str, block: int, half: int = 0) -> Value:
    """The scale of each element of `axis`, of which `block` neighbours share one along axis `over` of the scales.

    half: 1 where the elements are of the second of two matrices, one above the other in a weight.
    """
    number = iota(axis) // block
    return gather(scale, number + -(-size(axis) // block) if half else number, over=over)


def one(stack: np.ndarray, e: int) -> np.ndarray:
    """Expert e's part of a stack, in float64; zeros where there is no such expert."""
    return (stack[e] if 0 <= e < len(stack) else np.zeros(stack.shape[1:])).astype(np.float64)


def block_by_block(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """weight·x with scales for blocks of so many rows and columns, in float64, as references do it."""
    out = np.zeros(len(weight))
    with np.errstate(over="ignore", invalid="ignore"):
        for b, scales in enumerate(scale.T):
            part = np.s_[b * columns : (b + 1) * columns]
            out += weight[:, part] @ x[part] * np.repeat(scales, rows)[: len(weight)]
    return out


def gated(x: np.ndarray, gate_up: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """silu(gate·x)·(up·x) of a weight [gate | up], each of which has its own blocks of rows."""
    pairs = zip(*(np.split(a, 2) for a in (gate_up, scale)), strict=True)
    gate, up = (block_by_block(x, *pair, rows, columns) for pair in pairs)
    with np.errstate(over="ignore", invalid="ignore"):
        return gate / (1 + np.exp(-gate)) * up
