"""The Graph: what a declaration means for given dtypes and static sizes, as a list of nodes over named axes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moekit.lang.elementwise import ELEMENTWISE
from moekit.lang.spec import Dim

UNARY = tuple(op for op, row in ELEMENTWISE.items() if row.arity == 1)
BINARY = tuple(op for op, row in ELEMENTWISE.items() if row.arity == 2)
COMPARE = tuple(op for op, row in ELEMENTWISE.items() if row.domain == "compare")


@dataclass(frozen=True)
class Along:
    """One index of a `read`: element `start + step * i` for every i of `axis` (axis None: the element `start`)."""

    axis: str | None
    start: int = 0
    step: int = 1

    def __str__(self) -> str:
        if self.axis is None:
            return str(self.start)
        scaled = self.axis if self.step == 1 else f"{self.step}*{self.axis}"
        return f"{self.start}+{scaled}" if self.start else scaled


@dataclass(frozen=True)
class By:
    """One index of a `read`: the integer value that is operand number `operand` of the node."""

    operand: int

    def __str__(self) -> str:
        return f"[{self.operand}]"


Index = Along | By


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
    """An output: node `value` written to tensor `tensor` at `index` (one entry per dimension; `By` counts in `ids`).

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

    @cached_property
    def _live(self) -> tuple[int, ...]:
        needed, stack = set(), [n for w in self.writes for n in (w.value, *w.ids)]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(self.nodes[node].args)
        return tuple(sorted(needed))

    @cached_property
    def elsewhere(self) -> dict[str, frozenset[int]]:
        """The updated tensors that are also read at other elements than the one written, with the dimensions that differ."""
        written = {w.tensor: [self._meaning(e, w.ids) for e in w.index] for w in self.writes}
        found: dict[str, frozenset[int]] = {}
        for n in (self.nodes[i] for i in self.live()):
            if n.op == "read" and (own := written.get(name := n.attr("tensor"))) is not None:
                read = [self._meaning(e, n.args) for e in n.attr("index")]
                differ = {d for d, pair in enumerate(zip(own, read, strict=True)) if pair[0] != pair[1]}
                found |= {name: found.get(name, frozenset()) | differ} if differ else {}
        return found

    @staticmethod
    def _meaning(entry: Index, args: tuple[int, ...]) -> Along | int:
        return entry if isinstance(entry, Along) else args[entry.operand]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The mesh axes over which live nodes add up, each with its number of ranks; empty where one rank does all."""
        live = (self.nodes[i] for i in self.live())
        return {n.attr("over"): n.attr("ranks") for n in live if n.op == "all_reduce"}

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


def _plain(value) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(str(v) for v in value) + ")"
    return str(value)
