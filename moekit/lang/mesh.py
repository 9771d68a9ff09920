"""What crosses the ranks of a mesh axis: values of which every rank has a part."""

from __future__ import annotations

from moekit.errors import DeclarationError, DtypeError, ShapeError
from moekit.lang.dtypes import is_float
from moekit.lang.trace import Value, as_value, convert

MOST_RANKS = 64  # of a mesh axis: a kernel has code for each


def all_reduce(x: Value, over: str) -> Value:
    """The sum of every rank's `x` over a mesh axis, in float32: rank 0's, plus rank 1's, and so on, the same bits on all ranks.

    `x` goes to the other ranks in its own dtype; the sum is rounded where the declaration casts it. One rank's is `x` in
    float32. Raises DeclarationError where there is no such mesh axis, ShapeError for a number of ranks that is none, DtypeError
    for what is no float.
    """
    x = as_value(x, "float32")
    builder, known = x.builder, ", ".join(x.builder.mesh) or "none"
    if over not in builder.mesh:
        of = f"an axis of arrays; sum(x, over={over!r}) adds up along it" if over in builder.sizes else "no mesh axis"
        raise DeclarationError(f"{builder.name}: all_reduce over {over!r}, which is {of} (mesh axes: {known})")
    ranks = builder.mesh[over]
    if not 1 <= ranks <= MOST_RANKS:
        raise ShapeError(f"{builder.name}: mesh axis {over} has {ranks} ranks; it must have 1 to {MOST_RANKS}")
    if not is_float(x.dtype):
        raise DtypeError(f"{builder.name}: all_reduce adds up floats, got {x.dtype}; cast first")
    if not x.axes:
        raise DeclarationError(f"{builder.name}: all_reduce of one number; it goes row by row, so x must vary over an axis")
    if ranks == 1:
        return convert(x, "float32")
    return builder.add("all_reduce", (x.node,), (("over", over), ("ranks", ranks)), "float32")
