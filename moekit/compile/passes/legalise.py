"""Workarounds for faults of compilers, each for the targets that need it and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import copysign

from moekit.compile import tile as t
from moekit.compile.schedule.targets import TARGETS
from moekit.lang.dtypes import int_of_width, is_float, itemsize

Rule = Callable[[t.Draft, t.Op], list[t.Op] | None]


def _narrowing(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """bfloat16 becomes float32 by its bits where something is rounded to float16 besides.

    LLVM (that of Triton 3.6) turns float16(float32(b) + float32(h)) into float16(b) + h, which is another number for a bfloat16
    b: it takes a narrower mantissa for a narrower type, and drops b's exponent range. It does not see through the bits.
    """
    if not isinstance(op, t.Cast) or (op.value.dtype, op.out.dtype) != ("bfloat16", "float32"):
        return None
    if not any(isinstance(o, t.Cast) and o.out.dtype == "float16" for o, _ in t.walk(d.program.body)):
        return None
    bits = d.cast(d.emit(t.Bitcast, "", "int16", value=op.value), "int32")
    d.emit(t.Bitcast, "", "float32", value=d.binary("shl", bits, d.const(16)))
    return d.becomes(op.out)


def _negation(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """-x of a float is x·-1, which is exact: Triton 3.6 and Pallas's Triton lowering take 0 - x, which makes +0 of +0."""
    if not isinstance(op, t.Unary) or op.op != "neg" or not is_float(op.out.dtype):
        return None
    d.binary("mul", op.value, d.const(-1.0, op.out.dtype))
    return d.becomes(op.out)


def _negative_zero(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """-0.0 is made of its bits: of the literal Triton 3.6 makes 0.0."""
    if not isinstance(op, t.Const) or not isinstance(op.value, float) or op.value != 0 or copysign(1, op.value) > 0:
        return None
    bits = d.const(-(2 ** (8 * itemsize(op.out.dtype) - 1)), int_of_width(op.out.dtype), op.out.axes)
    d.emit(t.Bitcast, "", op.out.dtype, value=bits)
    return d.becomes(op.out)


def _rounded_product(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """The sum of x[:, :, None]·y[None, :, :] along the middle is made of y[None, :, :]·x[:, :, None].

    Triton (3.6, no more in 3.8; not in XLA) takes the first for a product on the matrix unit, in TF32 whatever was asked for,
    and over fewer than eight elements adds each up several times.
    """
    if not isinstance(op, t.Binary) or op.op != "mul" or len(op.out.axes) != 3:
        return None
    if (op.left.axes, op.right.axes) != (op.out.axes[:2], op.out.axes[1:]):
        return None
    return [replace(op, left=op.right, right=op.left)]


def _float8(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """float8 becomes bfloat16 by way of float32: Triton 3.6 goes by float16, from where the one instruction is a slow one."""
    if not isinstance(op, t.Cast) or (op.value.dtype, op.out.dtype) != ("float8_e4m3fn", "bfloat16"):
        return None
    d.cast(d.cast(op.value, "float32"), "bfloat16")
    return d.becomes(op.out)


def _zeros_of_float8(d: t.Draft, op: t.Op) -> list[t.Op] | None:
    """Zeros that become float8 are their lanes' own smallest numbers before, which become zeros of the same sign.

    ptxas (that of CUDA 12.8, which Triton 3.6 brings) makes one instruction of two conversions whose operands it knows to be
    the same, as zeros past the end are, and gives it a register that nobody wrote for half of the result: seen on an H200.
    """
    if not isinstance(op, t.Cast) or (op.value.dtype, op.out.dtype) != ("float32", "float8_e4m3fn"):
        return None
    known = [d.program.axis(a) for a in op.out.axes]
    own = [a.name for a in known if a.block > 1 and a.extent is not None and a.mode in ("grid", "whole")]
    if not own:
        return None
    lane = reduce(lambda a, b: d.binary("add", a, b), [d.emit(t.Elements, axis=a) for a in own])
    zero = d.binary("eq", op.value, d.const(0.0, "float32"))
    bits = d.binary("or", d.emit(t.Bitcast, "", "int32", value=op.value), d.where(zero, lane, d.const(0)))
    d.cast(d.emit(t.Bitcast, "", "float32", value=bits), op.out.dtype)
    return d.becomes(op.out)


RULES: dict[str, Rule] = {
    "narrowing": _narrowing,
    "negation": _negation,
    "float8": _float8,
    "negative zero": _negative_zero,
    "rounded product": _rounded_product,
    "zeros of float8": _zeros_of_float8,
}


def legalise(program: t.TileProgram, target: str) -> t.TileProgram:
    """The program as the compiler behind `target` gets it right; KeyError for a target that there is not."""
    numbers, rules = t.Numbers(program.body), [RULES[fault] for fault in TARGETS[target].faults]

    def legal(op: t.Op) -> list[t.Op] | None:
        numbers.line = next((v.line for v in t.results(op)), "")
        done = (rule(t.Draft(program, numbers), op) for rule in rules)
        return next((ops for ops in done if ops is not None), None)

    return replace(program, body=t.rewrite(program.body, legal))
