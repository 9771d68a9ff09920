"""TileProgram → Mosaic GPU source (`plgpu.kernel`): a table from operation to text. Needs no jax to print.

A program is one warpgroup. Operands are whole arrays in global memory, indexed per axis by pointer, so a view is start + step·i
along each axis of its base; one that is written and read is one reference. How blocks lie in threads has been decided
(`compile/passes/fragments.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import gcd, prod
from typing import Any

from moekit import __version__
from moekit.backends import pallas
from moekit.backends.mosaic_helpers import IMPORTS, MOSAIC
from moekit.backends.pallas import buffers
from moekit.backends.printer import ATOM, COMMON, LOOSEST, Starts, Text, header, is_extreme, kernel_name, number
from moekit.compile import tile as t
from moekit.compile.passes.fragments import WIDEST, Fragment, following, fragments, neighbours, unspread
from moekit.compile.passes.helpers import helpers
from moekit.compile.passes.names import identifier
from moekit.compile.passes.staged import staged
from moekit.compile.plan import plan
from moekit.compile.rules.warpgroups import warpgroups
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.targets import TARGETS
from moekit.compile.tile.layouts import arrays
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph

THREADS = TARGETS["mosaic"].lanes * TARGETS["mosaic"].warps[0]
WORDS = pallas.WORDS | {"lanes": "", "broadcast": "spread({}, {})", "div": "trunc_div({}, {})", "rem": "trunc_rem({}, {})"}
REFUSED = {
    t.Scan: "running sums", t.Halves: "halves of blocks", t.Deinterleave: "packets", t.Interleave: "packets",
    t.Ways: "packets", t.Send: "packets", t.Receive: "packets", t.AtEnd: "flattened loops",
    t.Sides: "blocks of an axis twice",
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "int32", "int16", "bool")


def refusal(kernel: t.Kernel) -> str | None:
    """Why a kernel has no Mosaic text, in a sentence; None if it has."""
    for op, _ in (pair for section in kernel.sections for pair in t.walk(section.body)):
        if type(op) in REFUSED:
            return f"{kernel.name}: {REFUSED[type(op)]} are not printed for Mosaic GPU so far; choose pallas"
        if wrong := next((v for v in t.results(op) if v.dtype not in DTYPES), None):
            what = f"{wrong.name or 'a value'} is {wrong.dtype}, which is"
            return f"{kernel.name}: {what} not printed for Mosaic GPU so far; choose pallas"
        if isinstance(op, t.Loop) and len(op.over) > 1:
            return f"{kernel.name}: loops over parts are not printed for Mosaic GPU so far; choose pallas"
    if what := next((w for section in kernel.sections if (w := unspread(section, TARGETS["mosaic"]))), None):
        return f"{kernel.name}: {what} are not printed for Mosaic GPU so far; choose pallas"
    return None


def unprinted(graph: Graph, sizes: Mapping[str, int], schedule: Schedule | None = None) -> str | None:
    """Why a call on whole arrays with these sizes of its dynamic axes has no Mosaic kernels, in a sentence; None if it has."""
    if graph.ranks:
        return f"{graph.name}: packets are not printed for Mosaic GPU so far; choose pallas"
    made = plan(graph, schedule or warpgroups(graph, sizes), arrays(graph, sizes), sizes, "mosaic")
    return next((why for why in map(refusal, made.programs) if why), None)


class MosaicPrinter(pallas.PallasPrinter):
    """Blocks that say how they lie in threads, and accesses that say how wide they are."""

    words = WORDS

    def __init__(self, program: t.TileProgram, expressions: dict, pid: str, starts: Starts, layouts: dict[str, Fragment]):
        super().__init__(program, expressions, pid, starts)
        self.fragments, self.layouts = fragments(program, TARGETS["mosaic"]), layouts
        self.staged = staged(program, TARGETS["mosaic"])
        self.pending = False  # whether something was loaded since threads waited for each other

    def body(self, ops: Iterable[t.Op], depth: int) -> list[str]:
        """The lines of a run of operations. Threads that hold the same element all store it: where it is one that is read, too,
        they wait for each other first."""
        lines: list[str] = []
        for op in ops:
            if isinstance(op, t.Store) and self.pending and self.held_twice(op):
                lines.append("    " * depth + self.barrier())
                self.pending = False
            lines += super().body((op,), depth)
            if isinstance(op, t.Load | t.Loop | t.Barrier):
                self.pending = not isinstance(op, t.Barrier)
        return lines

    def choice(self, op: t.Where) -> str:
        """A choice between two blocks: of a condition that is a number (blocks of one element are) Mosaic makes no block."""
        if op.out.axes and not op.condition.axes and op.condition not in self.literals:
            return self.word("where", self.spread(op.condition, op.out.axes), *self.branches(op))
        return super().choice(op)

    def held_twice(self, op: t.Store) -> bool:
        """Whether several threads store one element of an array that is read."""
        axes, read = self.program.ordered(op.at.axes), buffers(self.program)[0]
        if self.program.param(op.at.tensor).viewed.buffer not in read:
            return False
        own = self.fragments.of(axes) if axes else None
        return own is None or own.threads(axes) < THREADS

    def layout(self, axes: tuple[str, ...], value: t.Value | None = None) -> str:
        """How a block over `axes` lies in threads, that of `value`, as text."""
        fragment = self.fragments.of(axes, value)
        sizes = zip(fragment.slots, fragment.sizes, strict=True)
        name = first = "_".join(f"{identifier(slot[0])}{size}" for slot, size in sizes).upper()
        number = 0
        while self.layouts.setdefault(f"{name}_LAYOUT", fragment) != fragment:  # another section's, of the same sizes
            number += 1
            name = f"{first}_{number}"
        name += "_LAYOUT"
        self.helper("tiled")
        gone = fragment.without(axes)
        return f"{name}.reduce({', '.join(map(str, gone)) if len(gone) == 1 else gone})" if gone else name

    def at(self, value: t.Value, axes: tuple[str, ...], level: int = ATOM) -> str:
        """A value spread over the whole block of `axes`."""
        if not value.axes or value.axes == axes:
            return self.text(value, level)
        dims = ", ".join(str(axes.index(a)) for a in value.axes)
        spread = f"{self.text(value)}, {self.shape(axes)}, {dims}"
        if {*axes} <= self.fragments.multiplied:
            return f"{self.helper('spread_to')}({self.layout(axes, value)}, {spread})"
        return f"{self.helper('spread')}({spread})"

    def spread(self, value: t.Value, axes: tuple[str, ...]) -> str:
        """A value as a block over `axes`, a number too."""
        if value.axes or not axes:
            return self.at(value, axes, LOOSEST)
        return f"{self.helper('spread')}({self.typed(value, LOOSEST)}, {self.shape(axes)})"

    def scalar(self, literal: str, dtype: str) -> str:
        """A literal of a dtype."""
        return f"jnp.full((), {literal}, {self.dtypes[dtype]})"

    def elements(self, op: t.Elements) -> Text:
        """The elements of an axis that a block holds."""
        if not op.out.axes:
            return self.first(op)
        first, _ = self.first(op)
        text = f"{self.helper('lanes')}({self.program.axis(op.axis).block}, {self.layout((op.axis,), op.out)})"
        return (f"{first} + {text}", pallas.PLUS) if first != "0" else (text, ATOM)

    def word(self, name: str, *args) -> str:
        """The text for something; a quotient and a remainder are a helper's."""
        if name in ("div", "rem"):
            self.helper(f"trunc_{name}")
        return super().word(name, *args)

    def width(self, at: t.Access, axes: tuple[str, ...], value: t.Value | None) -> int:
        """How many elements an access takes at once: neighbours in a lane, in memory and behind one mask."""
        layout, groups = self.program.param(at.tensor).viewed, following(self.program)
        if (along := neighbours(self.program, at, groups)) is None:
            return 1
        bounds = {op.out: op for op, _ in t.walk(self.program.body) if isinstance(op, t.InBounds)}
        width = min(self.fragments.of(axes, value).along(along), WIDEST // itemsize(self.program.param(at.tensor).dtype))
        pitch = [prod(layout.base[d + 1 :]) for d in range(len(layout.base))]
        strides = [pitch[axis] for axis, _ in (*layout.fixed, *layout.picked)]
        for index, axis, start, step in zip(at.index, layout.axes, layout.starts, layout.steps, strict=True):
            strides.append((start + step * index.start) * pitch[axis])
            for value, own in index.terms:
                first = groups.get(value, ("", 1))[0] == along and pitch[axis] * own * step == 1
                strides.append(groups[value][1] if first else pitch[axis] * own * step)
        for mask in (m for m in at.mask if along in m.axes):
            bound = bounds.get(mask)
            known = bound is not None and groups.get(bound.value, ("", 1))[0] == along
            strides += [groups[bound.value][1], self.program.axis(bound.axis).extent or 1] if known else [1]
        return gcd(width, *strides)

    def store(self, op: t.Store) -> str:
        axes = self.program.ordered(op.at.axes)
        self.helper("accesses")
        array, at, more = self.accessed(op.at, axes)
        value = self.spread(op.value, axes)
        return f"store({array}, {at}, {value}{more})"

    def accessed(self, at: t.Access, axes: tuple[str, ...], value: t.Value | None = None) -> tuple[str, str, str]:
        """An access, which loads `value`: its array, its index, and what else is to be said of it."""
        index = self.index(at, axes)
        layout = f", {self.layout(axes, value)}" if axes else ""
        mask = self.mask(at, axes)
        width = self.width(at, axes, value) if axes else 1
        more = layout + (f", mask={mask}" if mask else "") + (f", width={width}" if width > 1 else "")
        return f"{self.program.param(at.tensor).viewed.buffer}_ref", f"({index},)" if ", " not in index else f"({index})", more

    def fixed(self, at: str, axes: tuple[str, ...]) -> str:
        """A fixed index: a number."""
        return at

    def picked(self, name: str, axes: tuple[str, ...]) -> str:
        """An index that an operand holds: a number, too."""
        return name

    def initial(self, value: t.Value) -> str:
        """What a loop's carry begins as: a block of a number in a layout, which Mosaic does not always find."""
        text = self.typed(value, LOOSEST)
        return f"{self.helper('laid')}({text}, {self.layout(value.axes)})" if value.axes and value in self.inline else text


def _load(p: MosaicPrinter, op: t.Load) -> str:
    p.helper("accesses")
    array, at, more = p.accessed(op.at, op.out.axes, op.out)
    if op.out in p.staged:
        p.helper("staged")
        return f"asked({array}, {at}{more})"
    fill = number(float(op.fill) if op.out.dtype.startswith(("float", "bfloat")) else int(op.fill))
    return f"load({array}, {at}{more}{f', other={fill}' if op.at.mask and op.fill else ''})"


EXPRESSIONS: dict[type, Callable[[MosaicPrinter, Any], str | Text]] = {
    **COMMON,
    t.Load: _load,
    t.Binary: lambda p, op: _binary(p, op),
    t.Reduce: lambda p, op: _reduce(p, op),
    t.Dot: lambda p, op: _dot(p, op),
}


def _binary(p: MosaicPrinter, op: t.Binary) -> str | Text:
    if op.op not in ("maximum", "minimum"):
        return pallas.binary(p, op)
    a, b = p.pair(op)
    return f"jnp.{op.op}({a}, {b})"


def _reduce(p: MosaicPrinter, op: t.Reduce) -> str:
    axis = op.value.axes.index(op.axis)
    if is_extreme(op):
        return f"{p.helper(f'nan_{op.op}')}({p.text(op.value)}, {axis})"
    if op.op != "sum":
        return f"jnp.{op.op}({p.text(op.value)}, axis={axis})"
    value = p.text(op.value)
    if op.out.dtype == "float32" and p.fragments.of(op.value.axes, op.value).each(op.axis) == 1:
        value = f"lax.optimization_barrier({value})"  # or a lane's product and its neighbour's become an fma, in each another
    return f"jnp.sum({value}, axis={axis}, dtype={p.dtypes[op.out.dtype]})"


def _dot(p: MosaicPrinter, op: t.Dot) -> str:
    p.helper("mma")
    acc = p.text(op.acc) if op.acc else p.word("full", p.shape(op.out.axes), "0.0", p.dtypes["float32"])
    along = op.left.axes.index(op.axis), op.right.axes.index(op.axis)
    layouts = ", ".join(p.layout(v.axes, v) for v in (op.left, op.right, op.out))
    high, _, _ = p.fragments.of(op.out.axes, op.out).along_slot(op.out.axes[0])
    word = "mma_staged" if op.left in p.staged else "mma"
    return f"{word}({p.text(op.left)}, {p.text(op.right)}, {acc}, {along}, ({layouts}), {high})"


def emit(kernel: t.Kernel) -> str:
    """The source of one kernel: imports, helpers it needs, and a function of refs called `<name>_kernel`.

    It takes the arrays in the order of `buffers`: those it reads, then those that it writes and does not read. Sections are
    functions of their own, of which a program calls one.
    """
    shared = helpers(kernel)
    layouts: dict[str, Fragment] = {}
    printers = [MosaicPrinter(h.section, EXPRESSIONS, "pid", h.starts, layouts) for h in shared]
    bodies = [[*_picked(p), *p.body(p.program.body, 1)] for p in printers]
    alone = len(kernel.sections) == 1
    if numbered := not alone or re.search(r"\bpid\b", "\n".join(bodies[0])) is not None:
        printers[0].helper("program")
    names = sorted({h for p in printers for h in p.helpers} | (set() if alone else {"trunc_div", "trunc_rem"}))
    lines = [*header(kernel, __version__), *_imports([*names, *(() if alone else ("sections",))]), ""]
    for name in names:
        lines += ["", MOSAIC[name]]
    lines += [""] if layouts else []
    for name, of in layouts.items():
        turned = (", turned=True" if of.turned else "") + (", copies_first=True" if of.copies_first else "")
        lines.append(f"{name} = tiled(warps={of.warps}, lanes={of.lanes}, vector={of.vector}{turned})")
    for helper, body in zip(shared, bodies, strict=True) if not alone else ():
        takes = ["pid", *_refs(helper.section), *helper.starts.values()]
        lines += ["", "", f"def {helper.section.name}({', '.join(takes)}):", *body]
    lines += ["", "", f"def {kernel_name(kernel)}({', '.join(_refs(kernel))}):"]
    lines += ["    pid = program()"] if numbered else []
    return "\n".join([*lines, *(bodies[0] if alone else pallas.sections(kernel, shared, MosaicPrinter, _refs)), ""])


def _refs(kernel: t.Kernel) -> list[str]:
    """What a kernel calls the arrays it takes, in order."""
    read, written = buffers(kernel)
    return [f"{b}_ref" for b in dict.fromkeys((*read, *written))]


def _imports(names: Iterable[str]) -> list[str]:
    always = ("import jax.numpy as jnp", "from jax import lax", "from jax.experimental.pallas import mosaic_gpu as plgpu")
    needed = {*always, *(line for name in names for line in IMPORTS.get(name, ()))}
    return sorted(needed, key=lambda line: (line.startswith("from"), "jax" in line, line))


def _picked(printer: MosaicPrinter) -> list[str]:
    """What says at run time where some operands lie, each loaded once."""
    names = dict.fromkeys(name for p in printer.program.params for _, name in p.viewed.picked)
    return [f"    {name} = {name}_ref[0]" for name in names]
