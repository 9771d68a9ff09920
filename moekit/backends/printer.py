"""What every printer shares: going through a TileProgram, and expressions with no more parentheses than they need.

A printer is a table from operation to text. Which values get a line of their own, and what they are called, has been decided
(`compile/passes/names.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from moekit.compile import tile as t
from moekit.compile.passes.helpers import Helper
from moekit.compile.passes.names import extent_name, names
from moekit.lang.dtypes import is_float

# how tightly an operator binds in Python; what is no operator binds as an ATOM does
ATOM, NEGATED, TIMES, PLUS, SHIFTED, AND, XOR, OR, COMPARED, LOOSEST = 9, 8, 7, 6, 5, 4, 3, 2, 1, 0
OPERATORS = {
    "add": ("+", PLUS), "sub": ("-", PLUS), "mul": ("*", TIMES), "div": ("/", TIMES), "floordiv": ("//", TIMES),
    "rem": ("%", TIMES), "and": ("&", AND), "or": ("|", OR), "xor": ("^", XOR), "shl": ("<<", SHIFTED), "shr": (">>", SHIFTED),
    "eq": ("==", COMPARED), "ne": ("!=", COMPARED), "lt": ("<", COMPARED), "le": ("<=", COMPARED), "gt": (">", COMPARED),
    "ge": (">=", COMPARED),
}  # fmt: skip
SIGNS = {"neg": "-", "not": "~"}
SILENT = (t.Load, t.Elements, t.InBounds, t.Const, t.Extent)  # what they are for is said where they are used
LONGEST = 120  # characters of a line
Text = tuple[str, int]  # and how tightly it binds
Starts = Mapping[tuple[str, t.Index], str]


class Printer(ABC):
    """Prints one program with a table of expressions. `pid` is its number in the launch, as text; `starts` name the beginning
    of indices that it is told (`compile/passes/helpers.py`)."""

    #: Text around what it is said of: element-wise functions of one block by name; `lanes`, the numbers from 0 on; `element`, a
    #: constant one; `div` and `rem` of one; `typed`, a number of a dtype, and `full`, a block of it; `broadcast`, a block in
    #: another shape; `where`; `cast`, `bitcast`, a block in another dtype; `cumsum`, the running sum along a dimension;
    #: `barrier`; `there` and `everywhere`, which packets there are.
    words: Mapping[str, str]
    dtypes: Mapping[str, str]
    constant = ""  # what marks the name of a number
    basic: tuple[str, ...] = ()  # what helpers of packets stand on
    typed_literals: tuple[str, ...] = ()  # the dtypes of which a Python number is no literal

    def __init__(self, program: t.TileProgram, expressions: Mapping[type, Callable], pid: str, starts: Starts):
        self.program, self.expressions, self.pid, self.names = program, expressions, pid, names(program)
        self.starts = starts
        self.inline: dict[t.Value, Text] = {}
        self.literals: set[t.Value] = set()
        self.helpers: set[str] = set()
        self.said = ""

    def body(self, ops: Iterable[t.Op], depth: int) -> list[str]:
        """The lines of a run of operations."""
        lines: list[str] = []
        for op in ops:
            if isinstance(op, t.Prefetch):
                continue  # a hint, given where a backend has a place for it
            if isinstance(op, t.Loop):
                lines += self.loop(op, depth)
            elif isinstance(op, t.AtEnd):
                lines += self.at_end(op, depth)
            elif isinstance(op, t.Barrier):
                lines.append("    " * depth + self.barrier())
            elif text := self.store(op) if isinstance(op, t.Store) else self.line(op):
                lines += [*self.comment(op, depth), *wrapped("    " * depth + text)]
        return lines

    def comment(self, op: t.Op, depth: int) -> list[str]:
        """The declaration's line, where one begins."""
        if isinstance(op, t.Store):
            line = op.value.line if op.value in self.inline.keys() - self.literals else ""
        else:
            line = next((v.line for v in t.results(op)), "")
        if isinstance(op, SILENT) or line in ("", self.said):
            return []
        self.said = line
        return ["    " * depth + "# " + line]

    def line(self, op: t.Op) -> str | None:
        """`name = expression`, or None if the expression goes where its value is read."""
        out, *others = t.results(op)
        if out in self.names.same and isinstance(op, t.Elements):
            return None  # a loop's own variable
        found = self.expressions[type(op)](self, op)
        text, level = found if isinstance(found, tuple) else (found, ATOM)
        if (isinstance(op, t.Const) and not out.axes) or text == "0":
            self.literals.add(out)
        if out in self.names.inline or text == "0":
            self.inline[out] = text, level
            return None
        left = ", ".join(self.names[v] for v in (out, *others))
        return f"{left}{self.constant if isinstance(op, t.Const) else ''} = {text}"

    def text(self, value: t.Value, level: int = LOOSEST) -> str:
        """A value where it is read, in parentheses if it binds less tightly than `level`."""
        text, own = self.inline[value] if value in self.inline else (self.names[value], ATOM)
        return text if own >= level else f"({text})"

    def word(self, name: str, *args) -> str:
        """The backend's text for something."""
        return self.words[name].format(*args)

    def typed(self, value: t.Value, level: int = ATOM) -> str:
        """A value where a Python number would not do: one that is a literal gets its dtype."""
        return self.scalar(self.text(value), value.dtype) if value in self.literals else self.text(value, level)

    def barrier(self) -> str:
        """The line that brings a program's threads together."""
        return self.words["barrier"]

    @abstractmethod
    def scalar(self, literal: str, dtype: str) -> str:
        """A literal as a scalar of a dtype."""

    def at(self, value: t.Value, axes: tuple[str, ...], level: int = ATOM) -> str:
        """A value with dimensions of size 1 put in so that it lines up with `axes`."""
        if not value.axes or value.axes == axes:
            return self.text(value, level)
        return f"{self.text(value, ATOM)}[{', '.join(':' if a in value.axes else 'None' for a in axes)}]"

    def mask(self, at: t.Access, axes: tuple[str, ...]) -> str:
        """Where an access may touch memory, lined up with `axes`; "" for everywhere."""
        return " & ".join(self.at(m, axes, AND + 1 if len(at.mask) > 1 else LOOSEST) for m in at.mask)

    def shape(self, axes: tuple[str, ...]) -> str:
        """A block's shape as text."""
        return str(self.program.block(axes))

    def const(self, op: t.Const) -> str | Text:
        """A literal, but for a block of it, and where it would be of another dtype."""
        text, dtype = number(op.value), self.dtypes[op.out.dtype]
        if op.out.axes:
            return self.word("full", self.shape(op.out.axes), text, dtype)
        return self.word("typed", text, dtype) if op.out.dtype in self.typed_literals else (text, literal_level(text))

    def converted(self, op: t.Cast | t.Bitcast) -> str:
        """A block in another dtype."""
        word = self.words["cast" if isinstance(op, t.Cast) else "bitcast"]
        return word.format(self.typed(op.value, ATOM if word.startswith("{}") else LOOSEST), self.dtypes[op.out.dtype])

    def choice(self, op: t.Where) -> str:
        """A choice between two blocks."""
        axes = op.out.axes
        condition = self.typed(op.condition) if op.condition in self.literals else self.at(op.condition, axes, LOOSEST)
        return self.word("where", condition, *self.branches(op))

    def branches(self, op: t.Where) -> tuple[str, str]:
        """What there is to choose from."""
        return self.at(op.yes, op.out.axes, LOOSEST), self.at(op.no, op.out.axes, LOOSEST)

    def spread(self, value: t.Value, axes: tuple[str, ...]) -> str:
        """A value as a block over `axes`."""
        if value.axes == axes:
            return self.text(value)
        return self.word("broadcast", self.at(value, axes, LOOSEST), self.shape(axes))

    def pair(self, op: t.Binary) -> tuple[str, str]:
        """Two blocks as the arguments of a function; of two literals one gets its dtype."""
        left = self.typed(op.left) if {op.left, op.right} <= self.literals else self.at(op.left, op.out.axes, LOOSEST)
        return left, self.at(op.right, op.out.axes, LOOSEST)

    def operator(self, op: t.Binary) -> Text:
        """Two blocks with an operator between them; of two literals one gets its dtype."""
        sign, level = OPERATORS[op.op]
        inner = NEGATED if COMPARED < level < PLUS else level  # who knows how & binds beside +?
        left = self.at(op.left, op.out.axes, inner + (level == COMPARED))
        right = self.at(op.right, op.out.axes, inner + (inner == level))
        if {op.left, op.right} <= self.literals:
            left = self.typed(op.left)
        return f"{left} {sign} {right}", level

    def unary(self, op: t.Unary) -> Text:
        """A sign or a function of a block."""
        if sign := SIGNS.get(op.op):
            return f"{sign}{self.typed(op.value)}", NEGATED
        return self.word(op.op, self.typed(op.value, LOOSEST)), ATOM

    def program_id(self, axis: str) -> Text:
        """The block number along a grid axis, decoded from the one launch dimension; "0" for an axis of one block."""
        several = [(a, n) for a, n in zip(self.program.grid, self.program.counts, strict=True) if n != 1]
        at = next((i for i, (a, _) in enumerate(several) if a == axis), None)
        if at is None:
            return "0", ATOM
        below = [n for _, n in several[at + 1 :]]
        known = prod(n for n in below if isinstance(n, int))
        inner = " * ".join([*(count_of(n) for n in below if not isinstance(n, int)), *([str(known)] if known > 1 else [])])
        inner = f"({inner})" if " * " in inner and "//" in self.words["div"] else inner
        text = self.word("div", self.pid, inner) if inner else self.pid
        return (self.word("rem", text, count_of(several[at][1])) if at > 0 else text), TIMES if inner or at > 0 else ATOM

    def first(self, op: t.Elements) -> Text:
        """The element at which a block of an axis begins."""
        owner = self.program.bounded(op.axis)
        if owner.mode == "grid":
            return self.begin(owner)
        part = self.text(op.part, TIMES) + (f" * {owner.share}" if owner.share > 1 else "") if op.part else ""
        turn = self.text(op.turn) if op.turn else ""
        return " + ".join(filter(None, (part, turn))) or "0", PLUS if part and turn else TIMES if part else ATOM

    def elements(self, op: t.Elements) -> Text:
        """The elements of an axis that a block holds."""
        (first, level), axis = self.first(op), self.program.axis(op.axis)
        if not op.out.axes:
            return first, level
        lanes = self.word("lanes", axis.block)
        turn = self.word("div", lanes, 2 * axis.strip) if axis.of and 2 * axis.strip < axis.block else ""
        lanes = self.word("rem", lanes, axis.strip) if axis.of else lanes
        if turn:
            return f"{first + ' + ' if first != '0' else ''}{turn} * {axis.strip} + {lanes}", PLUS
        if first != "0":
            return f"{first} + {lanes}", PLUS
        return lanes, TIMES if axis.of and "%" in self.words["rem"] else ATOM

    def sides(self, op: t.Sides) -> str:
        """Nothing in the first half of an axis that is another one twice, a number in the second."""
        axis = self.program.axis(op.axis)
        lanes = self.word("lanes", axis.block)
        lanes = self.word("rem", lanes, 2 * axis.strip) if 2 * axis.strip < axis.block else lanes
        first = f"{lanes} < {axis.strip}"
        return self.word("where", first, *(self.word("element", n) for n in (0, op.apart)))

    def extent(self, axis: str) -> str:
        """An axis's extent: a number, or the kernel argument that carries it."""
        a = self.program.axis(axis)
        return str(a.extent) if a.extent is not None else extent_name(axis)

    def in_bounds(self, op: t.InBounds) -> Text:
        """Whether something is an element of an axis."""
        value = self.text(op.value, COMPARED + 1)
        if not op.signed:
            return f"{value} < {self.extent(op.axis)}", COMPARED
        return f"({value} >= 0) & ({value} < {self.extent(op.axis)})", AND

    def begin(self, axis: t.AxisBlock) -> Text:
        """The element at which a program's block of an axis begins, or its turns do."""
        text, level = self.program_id(axis.name) if axis.numbered else ("0", ATOM)
        if axis.block == 1 or text == "0":
            return text, level
        return f"{text if level >= TIMES else f'({text})'} * {axis.block}", TIMES

    def turn(self, op: t.Loop, depth: int) -> list[str]:
        """Where a turn begins along each axis."""
        lines = []
        for i, (var, over) in enumerate(zip(op.vars, op.over, strict=True)):
            inner = prod(self.program.turns(a) for a in op.over[i + 1 :])
            text = self.word("div", "turn", inner) if inner > 1 else "turn"
            text = self.word("rem", text, self.program.turns(over)) if i else text
            axis = self.program.axis(over) if isinstance(over, str) else None
            begin = f"{self.begin(axis)[0]} + " if axis and axis.beside else ""
            step = f" * {axis.step}" if axis and axis.step > 1 else ""
            lines.append("    " * depth + f"{self.names[var]} = {begin}{text}{step}")
        return lines

    @abstractmethod
    def loop(self, op: t.Loop, depth: int) -> list[str]:
        """The lines of a loop."""

    @abstractmethod
    def at_end(self, op: t.AtEnd, depth: int) -> list[str]:
        """The lines of what is done in the last turn over an axis."""

    @abstractmethod
    def store(self, op: t.Store) -> str:
        """The line of a store."""


#: What every printer writes in the same way.
COMMON: dict[type, Callable[[Any, Any], str | Text]] = {
    t.Const: lambda p, op: p.const(op),
    t.Elements: lambda p, op: p.elements(op),
    t.Extent: lambda p, op: p.extent(op.axis),
    t.Sides: lambda p, op: p.sides(op),
    t.InBounds: lambda p, op: p.in_bounds(op),
    t.Cast: lambda p, op: p.converted(op),
    t.Bitcast: lambda p, op: p.converted(op),
    t.Along: lambda p, op: p.text(op.value),
    t.Unary: lambda p, op: p.unary(op),
    t.Binary: lambda p, op: p.operator(op),
    t.Where: lambda p, op: p.choice(op),
    t.Scan: lambda p, op: p.words["cumsum"].format(p.text(op.value), op.value.axes.index(op.axis)),
}


def woven(parts: list[str], pair: str) -> str:
    """Text for an element of each of some blocks in turn, from that for two of them."""
    if len(parts) == 1:
        return parts[0]
    return pair.format(woven(parts[0::2], pair), woven(parts[1::2], pair))


def count_of(blocks: int | t.AxisBlock) -> str:
    """How many blocks an axis has, as text; of a dynamic one in Triton, where alone a program has such an axis."""
    if isinstance(blocks, int):
        return str(blocks)
    return f"tl.cdiv({extent_name(blocks.name)}, {blocks.block})" if blocks.block > 1 else extent_name(blocks.name)


def kernel_name(kernel: t.Kernel) -> str:
    """The name of the emitted function."""
    return f"{kernel.name}_kernel"


@dataclass(frozen=True)
class Call:
    """One section of a launch: the lines before it, which programs are its own, the number that each then has, and the helper

    called with the numbers it is told.
    """

    section: t.TileProgram
    before: list[str]
    inside: str
    own: str
    helper: str
    starts: tuple[int, ...]


def calls(kernel: t.Kernel, shared: Iterable[Helper], printer: type[Printer]) -> Iterator[Call]:
    """The sections of a launch: the programs of one after those of another, or for each block of the outermost axis those of

    every section.
    """
    abreast = isinstance(kernel, t.Joined) and kernel.abreast
    counts = [s.counts[1:] if abreast else s.counts for s in kernel.sections]
    known = [prod(n for n in each if isinstance(n, int)) if all(isinstance(n, int) for n in each) else None for each in counts]
    helper = {section.name: (h.section.name, starts) for h in shared for section, starts in h.calls}
    before, begin, at, total = [], "0", "at" if abreast else "pid", sum(n for n in known if n)
    if abreast:
        before = [f"    at, turn = {printer.words['rem'].format('pid', total)}, {printer.words['div'].format('pid', total)}"]
    for i, (section, n) in enumerate(zip(kernel.sections, known, strict=True)):
        if n is not None and begin.isdecimal():
            end = str(int(begin) + n)
        else:
            end, programs = f"end_{i}", " * ".join(count_of(n) for n in counts[i] if n != 1) or "1"
            before.append(f"    {end} = {begin} + {programs}" if begin != "0" else f"    {end} = {programs}")
        inside = f"{at} < {end}" if begin == "0" else f"({at} >= {begin}) & ({at} < {end})"
        own = (f"turn * {n} + " if n != 1 else "turn + ") * abreast + at + (f" - {begin}" if begin != "0" else "")
        yield Call(section, before, inside, own, *helper[section.name])
        before, begin = [], end


def wrapped(line: str) -> list[str]:
    """A line as it is, or where it is long on several: broken between the arguments of its outermost call."""
    pieces, depth, begin = [], 0, 0
    for i, c in enumerate(line):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 1 and line[i + 1 : i + 2] == " ":
            pieces.append(line[begin : i + 1])
            begin = i + 2
    pieces.append(line[begin:])
    lines, indent = [pieces[0]], " " * (len(line) - len(line.lstrip()) + 4)
    for piece in pieces[1:]:
        if len(line) > LONGEST and len(lines[-1]) + len(piece) >= LONGEST:
            lines.append(indent + piece)
        else:
            lines[-1] += " " + piece
    return lines


def header(kernel: t.Kernel, version: str) -> list[str]:
    """What stands above a kernel: where it comes from."""
    first = f"# {kernel.name} {kernel.digest}, generated by moekit {version}; schedule: "
    axes = [", ".join(_held(a) for a in s.axes if _own(s, a)) for s in kernel.sections]
    compiled = f"{kernel.warps} warps, {kernel.stages} stages"
    if len(kernel.sections) == 1:
        return [f"{first}{axes[0]}, {compiled}"]
    return [f"{first}{compiled}", *(f"#   {s.name}: {a}" for s, a in zip(kernel.sections, axes, strict=True))]


def _own(section: t.TileProgram, axis: t.AxisBlock) -> bool:
    """Whether an axis is not said with another: what counts another one's parts, or is another one twice."""
    counts = not axis.beside and any(axis.mode == "loop" and axis.name == f"{a.name}.part" for a in section.axes)
    return axis.mode != "gather" and axis.of is None and not counts


def _held(axis: t.AxisBlock) -> str:
    parts = f" in {axis.parts} parts" if axis.parts > 1 else ""
    return f"{axis.name} {axis.mode} {axis.block}{parts}" + (f" by {axis.beside} programs" if axis.beside else "")


def number(value: bool | int | float) -> str:
    """A literal that Python reads back as the same number; infinities and NaN through float()."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def literal_level(text: str) -> int:
    """How tightly a number binds: a minus sign is an operator."""
    return NEGATED if text.startswith("-") else ATOM


def is_extreme(op: t.Binary | t.Reduce) -> bool:
    """Whether an operation is a maximum or minimum of floats, of which NaN is part."""
    value = op.left if isinstance(op, t.Binary) else op.value
    return op.op in ("maximum", "minimum", "max", "min") and is_float(value.dtype)
