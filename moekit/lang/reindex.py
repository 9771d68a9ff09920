"""Slicing and gathering as substitution: the index of an axis is replaced, down to the reads."""

from __future__ import annotations

from moekit.errors import DeclarationError
from moekit.lang.graph import Index
from moekit.lang.trace import Builder, Value, constant


def reindex(x: Value, axis: str, by: Index | Value) -> Value:
    """`x` with index i of `axis` replaced by `by`: an index along other axes, or an integer value.

    Element-wise values, and reductions over other axes, are recomputed at the new index, so nothing is copied.
    """
    done: dict[int, int] = {}
    return Value(x.builder, visit(x.builder, x.node, axis, by, done))


def visit(b: Builder, node: int, axis: str, by: Index | Value, done: dict[int, int]) -> int:
    """The node with index i of `axis` replaced; `done`: nodes that have been, by what they were."""
    n = b.nodes[node]
    if axis not in n.axes:
        return node
    if node not in done:
        done[node] = _replace(b, node, axis, by, done)
    return done[node]


def _replace(b: Builder, node: int, axis: str, by: Index | Value, done: dict[int, int]) -> int:
    n = b.nodes[node]
    new_axes = by.axes
    inner = {str(value) for name, value in n.attrs if name in ("axis", "into")}
    if n.op in ("cumsum", "top_k", "pick", "before", "after") and axis in inner:
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
        return _affine(b, n.attr("index"), axis, by).node
    return b.add(n.op, [visit(b, a, axis, by, done) for a in n.args], n.attrs, n.dtype).node


def _affine(b: Builder, index: Index, axis: str, by: Index | Value) -> Value:
    """The value of an index with `by` in the place of an axis."""
    if isinstance(by, Index):
        return _iota(b, index.put(axis, by))
    step, rest = dict(index.terms)[axis], Index(tuple(term for term in index.terms if term[0] != axis))
    value = by * constant(step, by.dtype) if step != 1 else by
    value = value + _iota(b, rest) if rest.terms else value
    return value + constant(index.start, by.dtype) if index.start else value


def _chosen(b: Builder, index: Index, axis: str, by: Value, whole: Index) -> Value:
    """What an integer stands for in an index of a read; where it is past the axis' ends, an element that no tensor has.

    whole: the index of the tensor's own axis. Of an axis that is part of it an element past the ends may be the tensor's, and
    so may be what a product of the integer wraps to.
    """
    value, size = _affine(b, index, axis, by), b.axis_size(axis)
    beyond = index.terms == ((axis, 1),) and index.start <= 0  # so integers past the ends are past the tensor's, too
    if size is None or (beyond and all(size + index.start >= (b.axis_size(own) or 0) for own in whole.axes)):
        return value
    inside, nowhere = (by >= 0) & (by < size), constant(-1, value.dtype)
    return b.add("where", (inside.node, value.node, nowhere.node), (), value.dtype)


def _iota(b: Builder, index: Index) -> Value:
    return b.add("iota", (), (("index", index),), "int32")


def _read(b: Builder, node: int, axis: str, by: Index | Value, done: dict[int, int]) -> int:
    n = b.nodes[node]
    args, found = [], []
    whole = next(x for x in b.nodes if x.op == "read" and x.attr("tensor") == n.attr("tensor")).attr("index")
    for entry, own in zip(n.attr("index"), whole, strict=True):
        new: Index | int = entry
        if entry.operands:  # which stand alone
            new = visit(b, n.args[entry.alone], axis, by, done)
            new = b.nodes[new].attr("index") if b.nodes[new].op == "iota" else new
        elif axis in entry.axes:
            new = entry.put(axis, by) if isinstance(by, Index) else _chosen(b, entry, axis, by, own).node
        args += [new] if isinstance(new, int) else []
        found.append(Index.of(len(args) - 1) if isinstance(new, int) else new)
    return b.add("read", args, (("tensor", n.attr("tensor")), ("index", tuple(found))), n.dtype).node
