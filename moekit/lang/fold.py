"""Operations on constants are done while tracing, so that no emitter sees one.

Floats are computed in float64 and rounded once, where the constant is used; a narrowing cast of one is rounded here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moekit.lang.dtypes import is_float, numpy_dtype, round_to


def _truncated(a, b):
    return a * 0 if b == 0 else np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


_FOLD: dict[str, Callable] = {
    "neg": np.negative, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "abs": np.abs, "not": np.invert,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softplus": lambda x: np.logaddexp(0, x),
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "floordiv": _truncated, "rem": lambda a, b: a - _truncated(a, b) * b,
    "maximum": np.maximum, "minimum": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "where": np.where,
    "cast": lambda x: x,
}  # fmt: skip


def fold(op: str, args: list[tuple[bool | int | float, str]], dtype: str) -> bool | int | float | None:
    """The value of `op` on constants (value, dtype), as a Python number; None for an operation not done here."""
    if op not in _FOLD:
        return None
    arrays = [np.asarray(v, np.float64 if is_float(d) else numpy_dtype(d)) for v, d in args]
    with np.errstate(all="ignore"):
        value = _FOLD[op](*arrays)
        if not is_float(dtype):
            return np.asarray(value).astype(numpy_dtype(dtype)).item()
        return float(value) if dtype == "float32" else float(round_to(np.asarray(value, np.float64), dtype))
