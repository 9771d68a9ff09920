"""Slicing and gathering as substitution: the index of an axis is replaced, down to the reads."""

from __future__ import annotations

from moekit.errors import DeclarationError
from moekit.lang.graph import Along, By
from moekit.lang.trace import Builder, Value, constant


def reindex(x: Value, axis: str, by: Along | Value) -> Value:
    """`x` with index i of `axis` replaced by `by`: an affine index along another axis, or an integer value.

    Element-wise values, and reductions over other axes, are recomputed at the new index, so nothing is copied.
    """
    done: dict[int, int] = {}
    return Value(x.builder, _visit(x.builder, x.node, axis, by, done))


def _visit(b: Builder, node: int, axis: str, by: Along | Value, done: dict[int, int]) -> int:
    n = b.nodes[node]
    if axis not in n.axes:
        return node
    if node not in done:
        done[node] = _replace(b, node, axis, by, done)
    return done[node]


def _replace(b: Builder, node: int, axis: str, by: Along | Value, done: dict[int, int]) -> int:
    n = b.nodes[node]
    new_axes = (by.axis,) if isinstance(by, Along) else by.axes
    inner = {str(value) for name, value in n.attrs if name in ("axis", "into")}
    if n.op in ("cumsum", "top_k", "pick") and axis in inner:
        raise DeclarationError(
            f"{b.name}: a {n.op} cannot be sliced or gathered along its own axis {axis!r}; slice its operand, "
            "or select with where(iota(...) == ..., ...)"
        )
    if inner & set(new_axes):
        raise DeclarationError(f"{b.name}: axis {sorted(inner)[0]!r} is summed inside the sliced value; use another name")
    if n.op == "place":
        inner = set(n.attr("over")) | {a for x in n.args[1:] for a in b.nodes[x].axes}
        if inner & {axis, *new_axes}:
            raise DeclarationError(
                f"{b.name}: what is placed along {', '.join(n.attr('over'))} cannot be sliced or gathered along it, or by what "
                f"is along one of {', '.join(sorted(inner))}; slice or gather what is placed"
            )
    if n.op == "read":
        return _read(b, node, axis, by, done)
    if n.op == "iota":
        return _affine(b, n.attr("index"), by).node
    return b.add(n.op, [_visit(b, a, axis, by, done) for a in n.args], n.attrs, n.dtype).node


def _affine(b: Builder, index: Along, by: Along | Value) -> Value:
    """The value start + step·(what replaces the axis)."""
    if isinstance(by, Along):
        return b.add("iota", (), (("index", _along(index, by)),), "int32")
    value = by
    if index.step != 1:
        value = value * constant(index.step, by.dtype)
    return value + constant(index.start, by.dtype) if index.start else value


def _read(b: Builder, node: int, axis: str, by: Along | Value, done: dict[int, int]) -> int:
    n = b.nodes[node]
    args, index = [], []
    for dim, entry in enumerate(n.attr("index")):
        new: Along | int = entry if isinstance(entry, Along) else _visit(b, n.args[entry.operand], axis, by, done)
        if isinstance(new, int) and b.nodes[new].op == "iota":
            new = b.nodes[new].attr("index")
        elif isinstance(new, Along) and new.axis == axis:
            new = _along(new, by) if isinstance(by, Along) else _affine(b, new, by).node
        if isinstance(new, Along) and new != entry and not _inside(b, n.attr("tensor"), dim, new):
            new = b.add("iota", (), (("index", new),), "int32").node
        args += [new] if isinstance(new, int) else []
        index.append(By(len(args) - 1) if isinstance(new, int) else new)
    return b.add("read", args, (("tensor", n.attr("tensor")), ("index", tuple(index))), n.dtype).node


def _inside(b: Builder, tensor: str, dim: int, index: Along) -> bool:
    """Whether an affine index stays within dimension `dim` of a tensor; else it is checked as ids are, and zero outside."""
    whole = next(n for n in b.nodes if n.op == "read" and n.attr("tensor") == tensor).attr("index")[dim]
    full, size = (b.axis_size(i.axis) if i.axis else 1 for i in (whole, index))
    if full is None or size is None:
        return index == whole
    return size == 0 or 0 <= index.start <= index.start + index.step * (size - 1) < full


def _along(index: Along, by: Along) -> Along:
    """An index along an axis of which `by` takes the place."""
    return Along(by.axis, index.start + index.step * by.start, index.step * by.step)
