"""What every emitter shares: walking a TileProgram and choosing which values get a line of their own.

An emitter is a table from operation to text. A value that the declaration does not name and that is used once, nearby,
is written inside the expression that uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping

from moekit.compile import tile as t
from moekit.compile.naming import TEMPORARY, extent_name

INLINE = (t.Cast, t.Bitcast, t.Unary, t.Binary, t.Where, t.InBounds, t.Index)
LONGEST_INLINE = 64


class Printer(ABC):
    """Prints one program with a table of expressions; `statement` handles loops and stores."""

    def __init__(self, program: t.TileProgram, expressions: Mapping[type, Callable[[Printer, t.Op], str]], pid: str):
        self.program, self.expressions, self.pid = program, expressions, pid
        self.inline: dict[str, str] = {}
        self.literals: set[str] = set()
        self.helpers: set[str] = set()
        self.uses = _uses(program.body)

    def body(self, ops, depth: int) -> list[str]:
        """The lines of a run of operations."""
        lines: list[str] = []
        local = _uses(ops, nested=False)
        for op in ops:
            lines += self.comment(op, depth)
            if isinstance(op, t.Loop):
                lines += self.loop(op, depth)
            elif isinstance(op, t.Store):
                lines.append("    " * depth + self.store(op))
            elif isinstance(op, t.Prefetch):
                continue  # a hint, given where a backend has a place for it
            elif text := self.line(op, local):
                lines.append("    " * depth + text)
        return lines

    def comment(self, op, depth: int) -> list[str]:
        """The declaration's line, where one begins."""
        made = t.result(op)
        name = made.name if made else ""
        return ["    " * depth + "# " + self.program.comments[name]] if name in self.program.comments else []

    def line(self, op, local: Counter) -> str | None:
        """`name = expression`, or None if the expression goes where its value is used."""
        text = self.expressions[type(op)](self, op)
        name = op.out.name
        if isinstance(op, t.Const) or text == "0":
            self.literals.add(name)
        if name in self.literals or self._goes_inline(op, text, local):
            self.inline[name] = text
            return None
        return f"{name} = {_bare(text)}"

    def _goes_inline(self, op, text: str, local: Counter) -> bool:
        name = op.out.name
        if isinstance(op, t.Full) and self.uses[name] == 1:
            return True
        if not isinstance(op, INLINE) or not name.startswith(TEMPORARY + "_") or len(text) > LONGEST_INLINE:
            return False
        return self.uses[name] == 1 and local[name] == 1

    def text(self, value: t.Value) -> str:
        """A value where it is used."""
        return self.inline.get(value.name, value.name)

    def typed(self, value: t.Value) -> str:
        """A value where a Python number would not do: one that is a literal gets its dtype."""
        text = self.text(value)
        return self.scalar(text, value.dtype) if value.name in self.literals else text

    @abstractmethod
    def scalar(self, literal: str, dtype: str) -> str:
        """A literal as a scalar of a dtype."""

    def arg(self, value: t.Value) -> str:
        """A value as the argument of a call."""
        return _bare(self.text(value))

    def at(self, value: t.Value, axes: tuple[str, ...]) -> str:
        """A value with dimensions of size 1 put in so that it lines up with `axes`."""
        text = self.text(value)
        if not value.axes or value.axes == axes:
            return text
        return f"{text}[{', '.join(':' if a in value.axes else 'None' for a in axes)}]"

    def shape(self, axes: tuple[str, ...]) -> str:
        """A block's shape as text."""
        return "(" + "".join(f"{n}, " for n in self.program.block(axes)).rstrip(" ").removesuffix("," * (len(axes) > 1)) + ")"

    def store_axes(self, op: t.Store | t.Prefetch) -> tuple[str, ...]:
        """The axes of the block that a store writes, or of the addresses that a prefetch begins at."""
        axes = {a for v in op.index if v is not None for a in v.axes}
        return tuple(a.name for a in self.program.axes if a.name in axes)

    def program_id(self, axis: str, div: str, rem: str, count: Callable[[str], str]) -> str:
        """The block number along a grid axis, decoded from the one launch dimension."""
        pid = self.pid
        several = [a for a in self.program.grid if count(a) != "1"]
        if axis not in several:
            return rem.format(pid, 1)
        at = several.index(axis)
        inner = " * ".join(count(a) for a in several[at + 1 :])
        text = div.format(pid, f"({inner})" if " " in inner else inner) if inner else pid
        return rem.format(text, count(axis)) if at > 0 else text

    @abstractmethod
    def loop(self, op: t.Loop, depth: int) -> list[str]:
        """The lines of a loop."""

    @abstractmethod
    def store(self, op: t.Store) -> str:
        """The line of a store."""


def header(kernel: t.Kernel, version: str) -> list[str]:
    """What stands above a kernel: where it comes from."""
    first = f"# {kernel.name} {kernel.digest}, generated by moekit {version}; schedule: "
    axes = [", ".join(f"{a.name} {a.mode} {a.block}" for a in s.axes if a.mode != "gather") for s in kernel.sections]
    compiled = f"{kernel.warps} warps, {kernel.stages} stages"
    if len(kernel.sections) == 1:
        return [f"{first}{axes[0]}, {compiled}"]
    return [f"{first}{compiled}", *(f"#   {s.name}: {a}" for s, a in zip(kernel.sections, axes, strict=True))]


def blocks(program: t.TileProgram, axis: str, extent_text: str) -> str:
    """How many blocks an axis has, as text: a number if its extent is static."""
    a = program.axis(axis)
    return str(-(-a.extent // a.block)) if a.extent is not None else extent_text


def extent_text(program: t.TileProgram, axis: str) -> str:
    """An axis's extent: a number, or the kernel argument that carries it."""
    a = program.axis(axis)
    return str(a.extent) if a.extent is not None else extent_name(axis)


def _bare(text: str) -> str:
    """`text` without parentheses around all of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


def _uses(ops, nested: bool = True) -> Counter:
    """How often each value is read (in loops' bodies too if `nested`)."""
    found: Counter = Counter()
    for op in ops:
        found.update(v.name for v in t.operands(op))
        if isinstance(op, t.Loop):
            found.update(v.name for v in op.yields) if nested else None
            if nested:
                found += _uses(op.body)
    return found


def number(value: bool | int | float) -> str:
    """A literal that Python reads back as the same number; infinities and NaN through float()."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)
