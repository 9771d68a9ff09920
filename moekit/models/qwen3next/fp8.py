"""FP8 weights in files: float8_e4m3fn codes beside one scale for every block of a matrix, read to float32, and made.

A weight is code · scale, a float32 product. Codes are made by ml_dtypes' rounding to nearest, ties to even, of values that
saturate at ±448, the largest that the format has: ml_dtypes alone would make NaN of larger ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import ml_dtypes
import numpy as np

from moekit.models.qwen3next.files import FP8, CheckpointError, Tensor, shown

SCALE = "_scale_inv"  # what the name of a weight's scales ends with, behind the weight's
SCALE_DTYPES = ("F32", "BF16")
MATRIX = re.compile(r".*(_proj|\.in_proj_\w+)\.weight|.*\.mlp\.experts\.(gate_up|down)_proj")  # what may be FP8
LARGEST = np.float32(448)

_LEAST = np.finfo(np.float32).smallest_subnormal
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # of each code


@dataclass(frozen=True)
class Blocks:
    """What `quantization_config` says: the rows and columns that share a scale, and the modules that are as they were."""

    rows: int
    columns: int
    kept: frozenset[str] = frozenset()

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix, or of a stack of them; the last blocks may be narrower."""
        *stack, rows, columns = shape
        return (*stack, -(-rows // self.rows), -(-columns // self.columns))

    def keeps(self, key: str) -> bool:
        """Whether the module of a tensor is named: by the beginning of its path or by the end. Patterns are not looked at."""
        parts = key.removesuffix(".weight").split(".")
        heads = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        tails = (".".join(parts[n:]) for n in range(1, len(parts)))
        return not self.kept.isdisjoint([*heads, *tails])


@dataclass(frozen=True)
class Float8:
    """Which of a layer's weights a model keeps as FP8 files have them, by name, and the files' blocks of rows and columns."""

    rows: int
    columns: int
    names: frozenset[str]

    @property
    def block(self) -> int:
        """Elements that share a scale along an axis that ranks do not cut: of rows and of columns, kernels take the same."""
        return gcd(self.rows, self.columns)

    def cut(self, own: int) -> int:
        """Elements that share a scale along an axis of which each rank has `own`: blocks end where a rank's part does."""
        return gcd(self.block, own)


def dequantised(codes: np.ndarray, scales: np.ndarray, blocks: Blocks, first: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A block of a matrix in float32: codes [n, d] float8_e4m3fn, and the scales of the whole matrix.

    first: the block's first row and column there, which need not begin a block of scales.
    """
    values = np.take(_VALUES, codes.view(np.uint8), mode="clip")
    (row, column), (count, width) = first, codes.shape
    wide = scales.astype(np.float32)[:, (column + np.arange(width)) // blocks.columns]
    with np.errstate(over="ignore", invalid="ignore"):  # whoever reads looks for what is not finite
        for nth in range(row // blocks.rows, -(-(row + count) // blocks.rows)):
            begin = max(nth * blocks.rows - row, 0)
            values[begin : (nth + 1) * blocks.rows - row] *= wide[nth]
    return values


def quantised(matrix: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, D] float8_e4m3fn of a finite matrix, and its float32 scales: each block's largest magnitude / 448.

    The scale of a block of zeros is 1; of one so small that float32 has no such scale, the least that it has.
    """
    rows, columns = matrix.shape
    down, across = blocks.grid(matrix.shape)
    tiles = np.zeros((down * blocks.rows, across * blocks.columns), np.float32)
    tiles[:rows, :columns] = matrix
    tiles = tiles.reshape(down, blocks.rows, across, blocks.columns)
    most = np.abs(tiles).max(axis=(1, 3))
    scales = np.where(most > 0, np.maximum(most / LARGEST, _LEAST), np.float32(1))
    codes = to_float8(tiles / scales[:, None, :, None]).reshape(down * blocks.rows, -1)
    return np.ascontiguousarray(codes[:rows, :columns]), scales


def to_float8(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to float8_e4m3fn, to nearest with ties to even; what exceeds ±448 is ±448, NaN stays."""
    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)


def scales_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], blocks: Blocks | None) -> dict[str, Tensor]:
    """The scales' tensor of each of the model's weights, of `shapes`, that the files hold in FP8; raises CheckpointError."""
    found = {}
    for key, shape in shapes.items():
        if (tensor := tensors[key]).dtype != FP8:
            continue
        if why := _problem(key, blocks):
            raise CheckpointError(f"{shown(tensor.name)}: tensor {key} has dtype {FP8}, and {why}")
        assert blocks is not None
        name, grid = key + SCALE, blocks.grid(shape)
        if name not in tensors:
            raise CheckpointError(f"{shown(tensor.name)}: tensor {key} has dtype {FP8}, and its scales {name} are in no file")
        scale = tensors[name]
        if scale.shape != grid or scale.dtype not in SCALE_DTYPES:
            got = f"dtype {shown(scale.dtype)} and shape {list(scale.shape)}"
            needed = f"{' or '.join(SCALE_DTYPES)} and {list(grid)}, one for {blocks.rows} × {blocks.columns} elements,"
            raise CheckpointError(f"{shown(scale.name)}: tensor {name} has {got} where {needed} are needed")
        found[key] = scale
    return found


def _problem(key: str, blocks: Blocks | None) -> str | None:
    """Why a tensor may not be FP8."""
    if not MATRIX.fullmatch(key):
        return "only the matrices of projections and experts are read in FP8; F32, F16 or BF16 is needed"
    if blocks is None:
        return "config.json has no quantization_config, which says what its scales are of"
    return "modules_to_not_convert of config.json names its module" if blocks.keeps(key) else None
