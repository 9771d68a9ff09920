"""Triton's interpreter, with what it gets wrong put right, for the process that uses it (seen with triton 3.6.0, numpy 2.5).

It cuts bits off where a cast to bfloat16 rounds, makes 480 of float8's NaN, multiplies the bits of bfloat16
operands of a dot as if they were integers, adds up a dot in an order that hangs on the block's shape, where a matrix unit goes
along the contracted axis step by step, and asks an array of one element for an int where a loop goes to a run-time extent,
which numpy 2.4 and later refuse. Its maximum and minimum give NaN where a GPU's drop it unless told otherwise; its dot never
rounds float32 operands to TF32. And it makes a reduction by a function element by element, which takes a minute instead of a
second, and its table of dtypes anew for every operation.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

LARGEST = 448.0  # of float8_e4m3fn
STEP = 16  # elements of the contracted axis that one instruction of a matrix unit takes
ORDER = {"backwards": False}  # whether a launch's last program goes first: the order of programs must not matter


def tf32(x: np.ndarray) -> np.ndarray:
    """Finite float32 numbers with the ten bits of mantissa that TF32 keeps."""
    rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def product(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a·b, sixteen elements of the contracted axis at a time: the same numbers whatever else a block holds."""
    for k in range(0, a.shape[1], STEP):
        acc = acc + (a[:, k : k + STEP].astype(np.float64) @ b[k : k + STEP].astype(np.float64)).astype(np.float32)
    return acc


def mend() -> None:
    """Put the interpreter right in this process; more often than once does no more."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    reducer = interpreter.ReduceOps
    if hasattr(builder, "mended"):
        return
    builder.mended = True
    cast, dot, place, reduce = builder.cast_impl, builder.create_dot, builder.set_grid_idx, reducer.generic_reduce
    patch, TensorHandle, numpy_type = interpreter._patch_lang_tensor, interpreter.TensorHandle, interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    own = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}  # which it has as integers

    def numbers(handle) -> np.ndarray:
        return handle.data.view(own.get(handle.dtype.scalar, handle.data.dtype))

    def known_type(dtype):
        name = dtype.scalar.name
        return known[name] if name in known else known.setdefault(name, numpy_type(dtype.scalar))

    def mended_cast(self, src, dst_type):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        narrow = dst_type.scalar == tl.bfloat16
        wanted = ml_dtypes.bfloat16 if narrow else interpreter._get_np_dtype(dst_type)
        data = numbers(src).astype(wanted)
        return TensorHandle(data.view(np.uint16) if narrow else data, dst_type.scalar)

    def converted(self, src, dst_type, rounding):
        """From or to float8; the instruction that rounds to it saturates."""
        wide = numbers(src).astype(np.float32)
        if dst_type.scalar != tl.float8e4nv:
            return mended_cast(self, TensorHandle(wide, tl.float32), dst_type)
        codes = np.clip(wide, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
        return TensorHandle(codes.view(np.uint8), tl.float8e4nv)

    def mended_dot(self, a, b, d, precision, *rest):
        coarse = a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32
        if a.data.ndim != 2 or d.dtype.scalar != tl.float32:
            return dot(self, a, b, d, precision, *rest)
        left, right = (numbers(x).astype(np.float32) for x in (a, b))
        left, right = map(tf32, (left, right)) if coarse else (left, right)
        return TensorHandle(product(left, right, d.data), d.dtype.scalar)

    def mended_place(self, x, y, z):
        place(self, self.grid_dim[0] - 1 - x if ORDER["backwards"] else x, y, z)

    def mended_patch(tensor, scope):  # for Triton 3.6
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def mended_reduce(self, input):
        """By halves: as many calls of the function as the axis has bits."""
        if len(input) > 1 or self.axis is None or self.keep_dims:
            return reduce(self, input)
        x, dtype = np.moveaxis(input[0].handle.data, self.axis, 0), input[0].dtype
        while len(x) > 1:
            half = len(x) // 2
            both = (self.to_tensor(part, dtype) for part in (x[:half], x[half : 2 * half]))
            x = np.concatenate([self.combine_fn.fn(*both).handle.data, x[2 * half :]])
        return [self.to_tensor(x[0], dtype)]

    builder.cast_impl, builder.create_dot, builder.set_grid_idx = mended_cast, mended_dot, mended_place
    builder.create_fp_to_fp = converted
    # for Triton 3.6 and 3.7
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter._patch_lang_tensor, reducer.generic_reduce = mended_patch, mended_reduce
    interpreter._get_np_dtype = known_type
