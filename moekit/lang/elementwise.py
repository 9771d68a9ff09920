"""The element-wise operations of the language: one row each, with all that is the same wherever one is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moekit.lang.dtypes import FLOATS, is_float, numpy_dtype, round_to


@dataclass(frozen=True)
class Elementwise:
    """An operation of `arity` operands that have one dtype.

    `meaning`: what it makes of numpy arrays. `domain`: what it is done in. "float": float32. "number": float32 or integers.
    "signed": the same, refused for bools. "integer" and "bits": integers, bits bools too. "any": any dtype. "compare": any
    dtype, and the result is a bool. `noun`: what kernels call a result that the declaration does not name.
    `about`: what the function that declarations call says of itself.
    """

    arity: int
    domain: str
    meaning: Callable
    noun: str = "value"
    about: str = ""


def _truncated(a, b):
    """Integer division as hardware does it: toward zero; by zero gives 0."""
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, 0, np.abs(a) // np.abs(safe) * np.sign(a) * np.sign(safe)).astype(a.dtype)


def _remainder(a, b):
    """What division toward zero leaves: it has the sign of the dividend."""
    return (a - _truncated(a, b) * b).astype(a.dtype)


ELEMENTWISE = {
    "neg": Elementwise(1, "signed", np.negative, "negative"),
    "abs": Elementwise(1, "signed", np.abs, "magnitude", "Absolute value."),
    "not": Elementwise(1, "bits", np.invert, "inverted"),
    "exp": Elementwise(1, "float", np.exp, "exponential", "e**x in float32."),
    "log": Elementwise(1, "float", np.log, "logarithm", "Natural logarithm in float32."),
    "sqrt": Elementwise(1, "float", np.sqrt, "root", "Square root in float32."),
    "rsqrt": Elementwise(1, "float", lambda x: 1 / np.sqrt(x), "scale", "1/sqrt(x) in float32."),
    "sigmoid": Elementwise(1, "float", lambda x: 1 / (1 + np.exp(-x)), "gated", "1/(1+exp(-x)) in float32."),
    "softplus": Elementwise(1, "float", lambda x: np.logaddexp(0, x), "softened", "log(1+exp(x)) in float32, never infinite."),
    "add": Elementwise(2, "number", np.add, "total"),
    "sub": Elementwise(2, "number", np.subtract, "difference"),
    "mul": Elementwise(2, "number", np.multiply, "product"),
    "div": Elementwise(2, "float", np.divide, "quotient"),
    "floordiv": Elementwise(2, "integer", _truncated, "quotient"),
    "rem": Elementwise(2, "integer", _remainder, "remainder"),
    "maximum": Elementwise(2, "any", np.maximum, "larger", "The larger of two; NaN if either is NaN."),
    "minimum": Elementwise(2, "any", np.minimum, "smaller", "The smaller of two; NaN if either is NaN."),
    "and": Elementwise(2, "bits", np.bitwise_and, "both"),
    "or": Elementwise(2, "bits", np.bitwise_or, "either"),
    "xor": Elementwise(2, "bits", np.bitwise_xor, "parity"),
    "shl": Elementwise(2, "integer", np.left_shift, "shifted"),
    "shr": Elementwise(2, "integer", np.right_shift, "shifted"),
    "eq": Elementwise(2, "compare", np.equal),
    "ne": Elementwise(2, "compare", np.not_equal),
    "lt": Elementwise(2, "compare", np.less),
    "le": Elementwise(2, "compare", np.less_equal),
    "gt": Elementwise(2, "compare", np.greater),
    "ge": Elementwise(2, "compare", np.greater_equal),
}

#: What a sum, maximum or minimum is of no elements, and the operation that puts two of them together.
IDENTITY = {
    ("sum", "float32"): 0.0,
    ("max", "float32"): float("-inf"),
    ("min", "float32"): float("inf"),
    ("sum", "int32"): 0,
    ("max", "int32"): -(2**31),
    ("min", "int32"): 2**31 - 1,
    ("sum", "int64"): 0,
    ("max", "int64"): -(2**63),
    ("min", "int64"): 2**63 - 1,
}
COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}

#: Of some domains which dtypes are refused, what is needed and what to do.
REFUSED = {
    "signed": (("bool",), "numbers", "use ~ or where"),
    "integer": ((*FLOATS, "bool"), "integers", "cast first"),
    "bits": (FLOATS, "integers or bools", "use bitcast"),
}


def fold(op: str, args: list[tuple[bool | int | float, str]], dtype: str) -> bool | int | float | None:
    """The value of `op` on constants (value, dtype), as a Python number; None for an operation not done while tracing.

    No printer sees an operation on constants alone. Floats are computed in float64 and rounded where the constant is used; a
    narrowing cast is rounded here.
    """
    others = {"where": np.where, "cast": lambda x: x}
    meaning = ELEMENTWISE[op].meaning if op in ELEMENTWISE else others.get(op)
    if meaning is None:
        return None
    arrays = [np.asarray(v, np.float64 if is_float(d) else numpy_dtype(d)) for v, d in args]
    with np.errstate(all="ignore"):
        value = np.asarray(meaning(*arrays))
        if not is_float(dtype):
            return value.astype(numpy_dtype(dtype)).item()
        return float(value) if dtype == "float32" else float(round_to(value, dtype))
