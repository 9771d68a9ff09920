"""The Graph: what a declaration means for given dtypes and static sizes, as a list of nodes over named axes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moekit.lang.dtypes import widened
from moekit.lang.elementwise import ELEMENTWISE, IDENTITY
from moekit.lang.spec import Dim

UNARY = tuple(op for op, row in ELEMENTWISE.items() if row.arity == 1)
BINARY = tuple(op for op, row in ELEMENTWISE.items() if row.arity == 2)
COMPARE = tuple(op for op, row in ELEMENTWISE.items() if row.domain == "compare")


@dataclass(frozen=True)
class Index[T]:
    """One index of a read, a write or an access of memory: `start + Σ step · term`; without terms the element `start`.

    In a Graph a term is the elements of an axis, by its name, or a value of integers, by the number of the operand that it is.
    In a program (`compile/tile`) terms are blocks: the elements of an axis, or integers that are data.
    """

    terms: tuple[tuple[T, int], ...] = ()
    start: int = 0

    @classmethod
    def of(cls, term: T, start: int = 0, step: int = 1) -> Index[T]:
        """The index of one term."""
        return cls(((term, step),), start)

    @property
    def values(self) -> tuple[T, ...]:
        """The terms, without their steps."""
        return tuple(value for value, _ in self.terms)

    @property
    def alone(self) -> T | None:
        """The term that is all of the index; None where there are more, a step or a start."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 and not self.start else None

    @property
    def axes(self) -> tuple[str, ...]:
        """Of an index in a Graph, the axes among its terms."""
        return tuple(value for value in self.values if isinstance(value, str))

    @property
    def operands(self) -> tuple[int, ...]:
        """Of an index in a Graph, the numbers of the operands among its terms."""
        return tuple(value for value in self.values if isinstance(value, int))

    def each[S](self, f: Callable[[T], S]) -> Index[S]:
        """The index with other terms in place of its own."""
        return Index(tuple((f(value), step) for value, step in self.terms), self.start)

    def put(self, term: T, by: Index[T]) -> Index[T]:
        """The index with `by` in the place of a term."""
        found: dict[T, int] = {}
        start = self.start
        for value, step in self.terms:
            inner = by if value == term else self.of(value)
            start += step * inner.start
            for each, own in inner.terms:
                found[each] = found.get(each, 0) + step * own
        return Index(tuple(found.items()), start)

    def __str__(self) -> str:
        terms = [
            f"{step}*" * (step != 1) + (f"[{value}]" if isinstance(value, int) else str(value)) for value, step in self.terms
        ]
        return "+".join([*([str(self.start)] if self.start or not terms else []), *terms])


@dataclass(frozen=True)
class Node:
    """One value: `op` applied to earlier nodes, with the axes it varies over in the graph's axis order."""

    op: str
    args: tuple[int, ...]
    attrs: tuple[tuple[str, object], ...]
    axes: tuple[str, ...]
    dtype: str

    def attr(self, name: str) -> Any:
        """The attribute `name`."""
        return dict(self.attrs)[name]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph. `dims` are as declared; a dimension that came with size 1 where `?` allows it is
    listed in `ones`."""

    name: str
    role: str
    dims: tuple[Dim, ...]
    dtype: str
    ones: frozenset[int] = frozenset()

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The axis of each dimension, None for one of size 1."""
        return tuple(None if i in self.ones else d.axis for i, d in enumerate(self.dims))


@dataclass(frozen=True)
class Write:
    """An output: node `value` written to tensor `tensor` at `index` (one per dimension; its operands are those in `ids`).

    `declared`: what the declaration calls the output, where this form of it writes to another tensor.
    """

    tensor: str
    value: int
    index: tuple[Index, ...]
    ids: tuple[int, ...] = ()
    declared: str = field(default="", repr=False)

    @property
    def output(self) -> str:
        """The output's name in the declaration, which schedules use."""
        return self.declared or self.tensor


@dataclass(frozen=True)
class Graph:
    """A traced declaration.

    `axes` maps every axis to its size, or None where the size is dynamic (a run-time argument of the kernel).
    The order of `axes` is the order in which tiles and arrays hold their dimensions. `each`: the elements of a part,
    where a launch makes parts of an axis by their length.
    """

    name: str
    axes: dict[str, int | None]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    writes: tuple[Write, ...]
    names: dict[int, str] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    each: dict[str, int] = field(default_factory=dict)

    def live(self) -> tuple[int, ...]:
        """The nodes some output needs, in order."""
        return self._live

    def live_nodes(self, *ops: str) -> Iterator[Node]:
        """The nodes some output needs, in order; of some operations alone, where these are said."""
        return (n for n in map(self.nodes.__getitem__, self._live) if not ops or n.op in ops)

    @cached_property
    def _live(self) -> tuple[int, ...]:
        return tuple(sorted(made_of(self.nodes, *(n for w in self.writes for n in (w.value, *w.ids)))))

    @cached_property
    def elsewhere(self) -> dict[str, frozenset[int]]:
        """The updated tensors that are also read at other elements than the one written, with the dimensions that differ."""
        written = {w.tensor: [_meaning(e, w.ids) for e in w.index] for w in self.writes}
        found: dict[str, frozenset[int]] = {}
        for n in self.live_nodes("read"):
            if (own := written.get(name := n.attr("tensor"))) is not None:
                read = [_meaning(e, n.args) for e in n.attr("index")]
                differ = {d for d, pair in enumerate(zip(own, read, strict=True)) if pair[0] != pair[1]}
                found |= {name: found.get(name, frozenset()) | differ} if differ else {}
        return found

    def inside(self, tensor: str, dim: int, index: Index) -> bool:
        """Whether an index along axes stays within dimension `dim` of a tensor; where not, zero is read past the ends."""
        axis = self.tensors[tensor].axes[dim]
        full, sizes = self.axes[axis] if axis else 1, [self.axes[a] for a in index.axes]
        if index.operands or full is None or None in sizes:
            return index == Index.of(axis)
        reach = [step * ((n or 0) - 1) for (_, step), n in zip(index.terms, sizes, strict=True)]
        least, most = (index.start + sum(f(0, r) for r in reach) for f in (min, max))
        return 0 in sizes or 0 <= least <= most < full

    @cached_property
    def needy(self) -> frozenset[int]:
        """The maxima and minima that need one element at least: not those that end, nor the largest score of a weighted sum."""
        live = [(i, self.nodes[i]) for i in self.live()]
        tops = {n.args[2] for _, n in live if n.op == "exp_sum"}
        folds = [(i, n) for i, n in live if n.op == "reduce" and n.attr("kind") != "sum" and i not in tops]
        return frozenset(i for i, n in folds if end_of(self.nodes, n.args[0], n.attr("axis"), n.attr("kind")) is None)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The mesh axes over which live nodes add up, each with its number of ranks; empty where one rank does all."""
        return {n.attr("over"): n.attr("ranks") for n in self.live_nodes("all_reduce")}

    def sizes(self, bound: Mapping[str, int]) -> dict[str, int]:
        """The size of every axis, of a call that says those of dynamic ones."""
        return {**bound, **{a: s for a, s in self.axes.items() if s is not None}}

    def shape(self, tensor: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a tensor, by the size of every axis."""
        return tuple(1 if a is None else sizes[a] for a in self.tensors[tensor].axes)

    def inputs(self) -> list[Tensor]:
        """The operands, in declared order."""
        return [t for t in self.tensors.values() if t.role in ("In", "InOut")]

    def outputs(self) -> list[Tensor]:
        """What is written, in the order the declaration returns it."""
        return [self.tensors[w.tensor] for w in self.writes]

    def digest(self) -> str:
        """A short hash of what the graph computes, names and comments left out."""
        text = repr(
            (
                self.name,
                sorted(self.axes.items(), key=str),
                list(self.tensors.values()),
                self.nodes,
                self.writes,
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def ordered(self, axes) -> tuple[str, ...]:
        """`axes` in the graph's order."""
        wanted = set(axes)
        return tuple(a for a in self.axes if a in wanted)

    def __str__(self) -> str:
        sizes = ", ".join(f"{a}={'dynamic' if s is None else s}" for a, s in self.axes.items())
        lines = [f"graph {self.name}({sizes})"]
        for t in self.inputs():
            lines.append(f"  {t.role.lower()} {t.name}: {t.dtype}[{', '.join(d.text for d in t.dims)}]")
        for i in self.live():
            lines.append("  " + self._node_text(i))
        for w in self.writes:
            index = ", ".join(map(str, w.index))
            lines.append(f"  write {w.tensor}[{index}] = {self._label(w.value)}")
        return "\n".join(lines)

    def _label(self, i: int) -> str:
        return f"%{i}" + (f":{self.names[i]}" if i in self.names else "")

    def _node_text(self, i: int) -> str:
        node = self.nodes[i]
        args = ", ".join(self._label(a) for a in node.args)
        attrs = ", ".join(f"{k}={_plain(v)}" for k, v in node.attrs)
        inner = "; ".join(part for part in (args, attrs) if part)
        return f"{self._label(i)} = {node.op}({inner}) : {node.dtype}[{', '.join(node.axes)}]"


def made_of(nodes: Sequence[Node], *which: int) -> set[int]:
    """Some nodes, and all that they are computed from."""
    found, left = set(), [*which]
    while left:
        if (i := left.pop()) not in found:
            found.add(i)
            left += nodes[i].args
    return found


def _meaning(entry: Index, args: tuple[int, ...]) -> Index:
    """An index whose operands are said by the numbers of nodes."""
    return entry.each(lambda term: term if isinstance(term, str) else args[term])


def below(nodes: Sequence[Node], node: int, axis: str) -> int | None:
    """The int32 value that a condition says the elements of an axis are below; None where it says no such thing."""
    if nodes[node].op != "lt":
        return None
    first, end = nodes[node].args
    along = nodes[first].op == "iota" and nodes[first].attr("index") == Index.of(axis)
    return end if along and axis not in nodes[end].axes and nodes[end].dtype == "int32" else None


def end_of(nodes: Sequence[Node], node: int, axis: str, kind: str) -> int | None:
    """The value of the element from which on a node is what a fold of a kind begins from; None where it is no such choice.

    `where(iota(axis) < end, x, identity)` says so.
    """
    n = nodes[node]
    other = nodes[n.args[2]] if n.op == "where" else None
    if other is None or other.op != "const" or other.attr("value") != IDENTITY[kind, widened(other.dtype)]:
        return None
    return below(nodes, n.args[0], axis)


def _plain(value) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(str(v) for v in value) + ")"
    return str(value)
