"""The dtypes a declaration may speak of, by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from moekit.errors import DtypeError

FLOATS = ("float32", "float16", "bfloat16")
INTS = ("int32", "int64", "int16", "int8")
STORED = ("float8_e4m3fn",)  # floats that are multiplied as they are, and else computed with as float32, into which they fit
ALL = (*FLOATS, *STORED, *INTS, "bool")

float32, float16, bfloat16 = FLOATS
int32, int64, int16, int8 = INTS
(float8_e4m3fn,) = STORED

_NUMPY = {name: np.dtype(name) for name in (*INTS, "bool", "float32", "float16", "float64")}
_NUMPY |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", *STORED)}

# explicit mantissa bits (without the hidden one) and smallest normal exponent of each float format
MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3}
MIN_EXPONENT = {"float32": -126, "float16": -14, "bfloat16": -126, "float8_e4m3fn": -6}
LARGEST = {"float8_e4m3fn": 448.0}  # of those that have no infinity: what exceeds it becomes it


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`; bfloat16 and float8_e4m3fn come from ml_dtypes."""
    return _NUMPY[name]


def is_float(name: str) -> bool:
    """Whether `name` is a floating-point dtype."""
    return name in FLOATS or name in STORED


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return _NUMPY[name].itemsize


def int_of_width(name: str) -> str:
    """The signed integer dtype as wide as `name`, for bitcasts."""
    return {1: "int8", 2: "int16", 4: "int32", 8: "int64"}[itemsize(name)]


def widened(name: str) -> str:
    """The dtype in which arithmetic on `name` is done: narrow floats compute in float32."""
    return "float32" if is_float(name) else name


def promote(a: str, b: str) -> str:
    """The dtype of an arithmetic result of two operands: float32 if either is a float, else the wider integer."""
    if a == b:
        return widened(a)
    if is_float(a) or is_float(b):
        return "float32"
    if "bool" in (a, b):
        return a if b == "bool" else b
    return a if itemsize(a) >= itemsize(b) else b


def round_to(x: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """Round float64 `x` once to `dtype` and return it as float64: a rounding point of a reference.

    What overflows is infinite; in float8_e4m3fn, which has no infinity, it is ±448, as an infinity is. NaN stays.
    """
    x, name = np.asarray(x, np.float64), dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float64", *FLOATS, *STORED):
        raise DtypeError(f"round_to: nothing is rounded to {name!r}; it takes float64, {', '.join((*FLOATS, *STORED))}")
    if name == "float64":
        return x
    if name in ("float32", "float16"):
        with np.errstate(over="ignore"):
            return x.astype(name).astype(np.float64)
    return _rounded(x, name)


def _rounded(x: np.ndarray, name: str) -> np.ndarray:
    """Round float64 to a format that numpy lacks with one rounding (a cast through float32 would round twice)."""
    with np.errstate(over="ignore", invalid="ignore"):
        _, exponent = np.frexp(x)
        quantum = np.ldexp(1.0, np.maximum(exponent - 1, MIN_EXPONENT[name]) - MANTISSA[name])
        rounded = np.where(np.isfinite(x), np.rint(x / quantum) * quantum, x)
        largest = float(ml_dtypes.finfo(numpy_dtype(name)).max)
        return np.where(np.abs(rounded) > largest, np.copysign(LARGEST.get(name, np.inf), rounded), rounded)
