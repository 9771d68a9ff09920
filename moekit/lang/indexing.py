"""The words that say where elements come from and go to: an index in place of another, down to the reads (`reindex.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from moekit.errors import DeclarationError, DtypeError, ShapeError
from moekit.lang.dtypes import is_float
from moekit.lang.graph import Index
from moekit.lang.ops import iota, names_of, size, summable, traced, where
from moekit.lang.reindex import reindex
from moekit.lang.trace import Value, as_value, current


def slice(x: Value, over: str, start: int, size: int, into: str, step: int = 1) -> Value:
    """Elements start, start+step, … (`size` of them) of axis `over`, along the new axis `into`."""
    builder = traced(x, "slice").builder
    full = builder.axis_size(over)
    if fractions := [n for n in (start, size, step) if not isinstance(n, int) or isinstance(n, bool)]:
        raise ShapeError(f"{builder.name}: slice takes whole numbers as start, size and step, got {fractions[0]!r}")
    if full is None:
        raise DeclarationError(f"{builder.name}: slice of the dynamic axis {over!r} could leave it; use gather (zero outside)")
    if step < 1 or size < 0:
        raise ShapeError(f"{builder.name}: slice takes step >= 1 and size >= 0, got {step} and {size}; gather goes backwards")
    last = start + step * (size - 1)
    if size > 0 and not (0 <= start < full and 0 <= last < full):
        raise ShapeError(f"{builder.name}: slice {start}:{last + 1}:{step} leaves axis {over} of size {full}")
    builder.new_axis(into, size)
    return reindex(x, over, Index.of(into, start, step))


def halves(x: Value, into: str) -> tuple[Value, Value]:
    """The two halves of an axis `2*I`, each along `I`: for `In("T 2*I")`, `gate, up = halves(x, "I")`."""
    over = f"2*{into}"
    if over not in traced(x, "halves").axes:
        raise DeclarationError(f"{x.builder.name}: halves into {into!r} needs an axis {over!r}, the value has {x.axes}")
    n = size(over) // 2
    return slice(x, over, 0, n, into), slice(x, over, n, n, into)


def blocks(x: Value, over: str, size: int, into: str) -> Value:
    """`x` in blocks along axis `over`: for `into="B I"`, element i of block b along B and I is element size·b + i.

    The last block may reach past the end, where tensors read zero, as at an id outside their axis.
    """
    builder, axes = traced(x, "blocks").builder, names_of(into)
    full = builder.axis_size(over)
    if len(axes) != 2 or axes[0] == axes[1]:
        raise DeclarationError(f"{builder.name}: blocks into {into!r}; name two axes, of the blocks and of a block's elements")
    if full is None:
        raise DeclarationError(
            f"{builder.name}: blocks of the dynamic axis {over!r}, of which no program knows how many; use gather"
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ShapeError(f"{builder.name}: blocks have 1 element or more, a whole number, got {size!r}")
    if met := [axis for axis in axes if axis == over or axis in x.axes]:
        raise DeclarationError(
            f"{builder.name}: blocks into {met[0]!r}, which the value varies over already; choose another name"
        )
    (block, element), count = axes, -(-full // size)
    if (there := builder.sizes.get(block, count)) != count:
        raise ShapeError(f"{builder.name}: axis {block} has {there} elements; {over} has {count} blocks of {size}; pass that")
    builder.new_axis(block, count)
    builder.new_axis(element, size)
    if not {element, block} & {*builder.blocked, *builder.blocked.values()}:
        builder.blocked[element] = block
    return reindex(x, over, Index(((block, size), (element, 1))))


def concat(*values: Value | float, over: str, into: str) -> Value:
    """Values one after the other along axis `into`: along `over`, one axis for all or one for each (`over="R R P"`).

    "1" in the place of an axis: the value is one element. Values that do not vary along their axis are repeated along it.
    An element of the result is chosen among all the values at its place, so these should be cheap; nothing is stored.
    """
    builder, axes = current(), names_of(over)
    axes = axes * len(values) if len(axes) == 1 else axes
    if not values or len(axes) != len(values):
        raise DeclarationError(
            f"{builder.name}: concat of {len(values)} values over {over!r}; name one axis for all or one for each"
        )
    counts = [1 if axis == "1" else builder.axis_size(axis) for axis in axes]
    for x, axis, n in zip(values, axes, counts, strict=True):
        if n is None:
            raise DeclarationError(
                f"{builder.name}: concat over the dynamic axis {axis!r}: where the next value begins must be static"
            )
        if axis != into and isinstance(x, Value) and into in x.axes:
            raise DeclarationError(f"{builder.name}: concat into {into!r}, which the value along {axis!r} varies over already")
    ends = list(accumulate(n or 0 for n in counts))
    builder.new_axis(into, ends[-1])
    parts = [
        reindex(as_value(x, "float32"), axis, Index.of(into, -begin))
        for x, axis, begin in zip(values, axes, [0, *ends], strict=False)
    ]
    found = parts[-1]
    for part, end in zip(parts[-2::-1], ends[-2::-1], strict=True):
        found = where(iota(into) < end, part, found)
    return found


def gather(table: Value, ids: Value | int, over: str) -> Value:
    """`table` at index `ids` of axis `over`; the result varies over the rest of `table` and over `ids`.

    An id outside the axis reads zero from the tensor, and never memory that is not the tensor's.
    """
    table = as_value(table, "float32")
    if isinstance(ids, int) and 0 <= ids < (table.builder.axis_size(over) or 0):
        return reindex(table, over, Index(start=int(ids)))
    ids = as_value(ids, "int32")
    if is_float(ids.dtype) or ids.dtype == "bool":
        raise DtypeError(f"{table.builder.name}: gather needs integer ids, got {ids.dtype}")
    table.builder.axis_size(over)
    return reindex(table, over, summable(ids))


@dataclass(frozen=True)
class Put:
    """An output written at `ids` of axis `over` of its InOut tensor; see `put`."""

    value: Value
    ids: Value | None
    over: str


def put(value: Value, ids: Value, over: str) -> Put:
    """Return this for an InOut tensor to write `value` at rows `ids` of axis `over`.

    No element may be written twice (a precondition): ids are unique, or rows of the tensor have one each. An id outside the
    axis writes nothing.
    """
    if not isinstance(ids, Value) or is_float(ids.dtype) or ids.dtype == "bool":
        raise DtypeError(f"{current().name}: put needs integer ids, got {ids!r}")
    return Put(value, summable(ids), over)


def place(value: Value, **at: Value) -> Value:
    """`value` at other places: what it is where `at` says, `place(rows, T=pairs // K, K=pairs % K)`.

    The result varies over the axes named in `at`, in place of those that the indices vary over. An index outside its axis
    places nothing, and no two may be the same (a precondition). What nothing is placed at is no particular number: keep it out
    by `where`. A launch of its own does it.
    """
    value, at = as_value(value, "float32"), {axis: as_value(index, "int32") for axis, index in at.items()}
    builder, gone = value.builder, {a for index in at.values() for a in index.axes}
    if not at:
        raise DeclarationError(f"{builder.name}: place names no axis; give each with its index, as in place(x, B=index)")
    for axis, index in at.items():
        builder.axis_size(axis)
        if is_float(index.dtype) or index.dtype == "bool":
            raise DtypeError(f"{builder.name}: place needs integer indices, got {index.dtype} for {axis}")
        if axis in value.axes and axis not in gone:
            raise DeclarationError(f"{builder.name}: place along {axis!r}, which the value varies over; give it another name")
    indices = [summable(index).node for index in at.values()]
    return builder.add("place", (value.node, *indices), (("over", tuple(at)),), value.dtype)
