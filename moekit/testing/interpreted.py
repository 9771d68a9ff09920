"""Triton's interpreter, with what it gets wrong put right, for the process that uses it (seen with triton 3.6.0, numpy 2.5).

It cuts bits off where a cast to bfloat16 rounds, multiplies the bits of bfloat16 operands of a dot as if they were integers,
and asks an array of one element for an int where a loop goes to a run-time extent, which numpy 2.4 and later refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

_order = {"backwards": False}


@contextmanager
def backwards(so: bool) -> Iterator[None]:
    """Whether a launch's last program goes first meanwhile: the order of programs must not matter."""
    _order["backwards"] = so
    try:
        yield
    finally:
        _order["backwards"] = False


def mend() -> None:
    """Put the interpreter right in this process; more often than once does no more."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "mended"):
        return
    builder.mended = True
    cast, dot, place, patch = builder.cast_impl, builder.create_dot, builder.set_grid_idx, interpreter._patch_lang_tensor

    def numbers(handle) -> np.ndarray:
        return handle.data.view(ml_dtypes.bfloat16) if handle.dtype.scalar == tl.bfloat16 else handle.data

    def mended_cast(self, src, dst_type):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        narrow = dst_type.scalar == tl.bfloat16
        wanted = ml_dtypes.bfloat16 if narrow else interpreter._get_np_dtype(dst_type)
        data = numbers(src).astype(wanted)
        return interpreter.TensorHandle(data.view(np.uint16) if narrow else data, dst_type.scalar)

    def mended_dot(self, a, b, d, *options):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *options)
        product = np.matmul(*(numbers(x).astype(np.float32) for x in (a, b)))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def mended_place(self, x, y, z):
        place(self, self.grid_dim[0] - 1 - x if _order["backwards"] else x, y, z)

    def mended_patch(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.cast_impl, builder.create_dot, builder.set_grid_idx = mended_cast, mended_dot, mended_place
    interpreter._patch_lang_tensor = mended_patch
