"""TileProgram → Triton source: a table from operation to text. Needs neither triton nor torch to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from moekit import __version__
from moekit.backends import packet_helpers
from moekit.backends.packet_calls import PACKETS
from moekit.backends.printer import (
    ATOM,
    COMMON,
    LONGEST,
    LOOSEST,
    PLUS,
    TIMES,
    Printer,
    Text,
    calls,
    header,
    is_extreme,
    kernel_name,
    number,
    woven,
)
from moekit.compile import tile as t
from moekit.compile.passes.helpers import Helper, helpers
from moekit.compile.passes.names import extent_name, identifier
from moekit.compile.schedule.targets import MEASURED
from moekit.lang.dtypes import STORED, itemsize

DTYPES = {
    "float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16", "int64": "tl.int64", "int32": "tl.int32",
    "int16": "tl.int16", "int8": "tl.int8", "bool": "tl.int1", "float8_e4m3fn": "tl.float8e4nv",
}  # fmt: skip

WORDS = {
    "exp": "tl.exp({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})", "abs": "tl.abs({})",
    "sin": "tl.sin({})", "cos": "tl.cos({})", "sigmoid": "tl.sigmoid({})", "lanes": "tl.arange(0, {})", "element": "{}",
    "div": "{} // {}", "rem": "{} % {}", "typed": "tl.full((), {}, {})", "full": "tl.full({}, {}, {})",
    "broadcast": "tl.broadcast_to({}, {})", "where": "tl.where({}, {}, {})", "cast": "{}.to({})",
    "bitcast": "{}.to({}, bitcast=True)", "cumsum": "tl.cumsum({}, axis={})", "barrier": "tl.debug_barrier()",
    "there": "tl.cast({}, tl.int32)", "everywhere": "tl.full((), 1, tl.int32)",
}  # fmt: skip

HELPERS = packet_helpers.TRITON | {
    "nan_max": """@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "nan_min": """@triton.jit
def nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "prefetch": '''@triton.jit
def prefetch(lines):
    """Ask for memory lines to come to the L2 cache; nothing is read."""
    ask: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(ask, "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
''',
}


def stride(tensor: str, axis: str) -> str:
    """The name of a tensor's stride along an axis, in elements."""
    return f"{tensor}_stride_{identifier(axis)}"


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel: a tensor's pointer, a dynamic axis's extent, or a stride in units of `unit` elements."""

    name: str
    kind: str
    subject: str
    dim: int = 0
    unit: int = 1


def arguments(program: t.Kernel) -> tuple[Argument, ...]:
    """The kernel's arguments in order: pointers, dynamic extents, then the strides that are not 1.

    A stride known to be a multiple of 16 bytes is passed in units of 16 bytes: Triton reads the alignment off the
    multiplication, where a hint on the argument itself is lost (seen with Triton 3.6).
    """
    args = [Argument(f"{p.name}_ptr", "pointer", p.name) for p in program.params]
    dynamic = dict.fromkeys(a.name for a in program.axes if a.extent is None)
    args += [Argument(extent_name(a), "extent", a) for a in dynamic]
    for p in program.params:
        for d, axis in enumerate(() if isinstance(p.layout, t.Mailbox) else p.axes):
            if axis is None or p.strided.strides[d] == "unit":
                continue
            unit = 16 // itemsize(p.dtype) if p.strided.strides[d] == "aligned" else 1
            suffix = f"_by{unit}" if unit > 1 else ""
            args.append(Argument(stride(p.name, axis) + suffix, "stride", p.name, d, unit))
    return tuple(args)


class TritonPrinter(Printer):
    """Loops and stores in Triton."""

    words, dtypes, constant, typed_literals = WORDS, DTYPES, ": tl.constexpr", ("float16", "bfloat16", "int16", "int8")
    basic = ("packets",)

    def __init__(self, *given):
        super().__init__(*given)
        self.counted: set[t.Value] = set()  # variables of loops, which Triton's interpreter has as Python numbers
        self.summands = {op.value for op, _ in t.walk(self.program.body) if isinstance(op, t.Reduce) and self.across(op)}

    def across(self, op: t.Reduce) -> bool:
        """Whether each lane of a warp may have one summand of a sum, so that it adds its neighbour's to its own."""
        return op.op == "sum" and op.out.dtype == "float32" and self.program.axis(op.axis).block <= MEASURED.lanes

    def loop(self, op: t.Loop, depth: int) -> list[str]:
        pad, counts = "    " * depth, [self.turns(a, op.end) for a in op.over]
        lines = [
            f"{pad}{self.names[c]} = {self.typed(i, LOOSEST)}"
            for c, i in zip(op.carries, op.inits, strict=True)
            if i in self.inline or self.names[i] != self.names[c]
        ]
        if len(op.over) > 1:
            lines.append(f"{pad}for turn in range({prod(map(self.program.turns, op.over))}):")
            lines += self.turn(op, depth + 1)
        elif op.unroll:
            lines.append(f"{pad}for turn in tl.static_range({counts[0]}):")
            lines.append(f"{pad}    {self.names[op.vars[0]]} = tl.cast(turn, tl.int32)")
        else:
            self.counted.add(op.vars[0])
            lines.append(f"{pad}for {self.names[op.vars[0]]} in range({counts[0]}):")
        lines += self.body(op.body, depth + 1)
        return lines + self.assigned(op.carries, op.yields, depth + 1)

    def turns(self, over: str | int, end: t.Value | None = None) -> str:
        """The arguments of the range of a loop."""
        if isinstance(over, int):
            return str(over)
        axis = self.program.axis(over)
        known = self.extent(over) if axis.length is None else str(axis.length)
        last = known if end is None else self.text(end)
        return last if axis.step == 1 and not axis.beside else f"{self.begin(axis)[0]}, {last}, {axis.step}"

    def at_end(self, op: t.AtEnd, depth: int) -> list[str]:
        count = self.program.turns(op.axis)
        lines = ["    " * depth + f"if turn % {count} == {count - 1}:", *self.body(op.body, depth + 1)]
        return lines + self.assigned(op.outs, op.yields, depth + 1)

    def assigned(self, targets: tuple[t.Value, ...], values: tuple[t.Value, ...], depth: int) -> list[str]:
        """What takes the place of some values, but for what has their names already."""
        pairs = [(self.names[a], self.text(v)) for a, v in zip(targets, values, strict=True)]
        return ["    " * depth + f"{name} = {text}" for name, text in pairs if name != text]

    def scalar(self, literal: str, dtype: str) -> str:
        return literal if literal.startswith("tl.") else f"tl.full((), {literal}, {DTYPES[dtype]})"

    def whole(self, waits: bool) -> list[str]:
        """All lines; where the program itself `waits` for the launches before it, what it asks for ahead comes before."""
        ops = self.program.body
        at = 1 + max((i for i, op in enumerate(ops) if isinstance(op, t.Prefetch)), default=-1) if waits else 0
        first = self.body(ops[:at], 1)  # before what is asked for is printed, which names what is defined here
        asked = ["        " + self.prefetch(op) for op in ops[:at] if isinstance(op, t.Prefetch)]
        wait = ["    if PDL:", *asked, f"        {WAIT}", f"        {TRIGGER}"] if waits else []
        return [*first, *wait, *self.body(ops[at:], 1)]

    def prefetch(self, op: t.Prefetch) -> str:
        """Of lanes that are masked the first line of the tensor is asked for."""
        axes, param = self.program.ordered(op.at.axes), self.program.param(op.at.tensor)
        step = t.LINE // itemsize(param.dtype)
        lanes = f"tl.arange(0, {op.size // step})"
        lanes = f"{lanes}[{', '.join(['None'] * len(axes) + [':'])}] * {step}" if axes else f"{lanes} * {step}"
        lines = f"{self.pointer(op.at, (*axes, ''))} + {lanes}"
        self.helpers.add("prefetch")
        mask = self.mask(op.at, (*axes, ""))
        return f"prefetch({f'tl.where({mask}, {lines}, {param.name}_ptr)' if mask else lines})"

    def store(self, op: t.Store) -> str:
        axes = self.program.ordered(op.at.axes)
        value = self.spread(op.value, axes) if op.value.axes else self.text(op.value)
        mask = self.mask(op.at, axes)
        return f"tl.store({self.pointer(op.at, axes)}, {value}{f', mask={mask}' if mask else ''})"

    def pointer(self, at: t.Access, axes: tuple[str, ...]) -> str:
        """The block of addresses: the pointer and one term per dimension, in 64 bits where the access says so."""
        param = self.program.param(at.tensor)
        terms, single = [f"{at.tensor}_ptr"], {a.name for a in self.program.axes if a.extent == 1}
        wides = at.wide or (False,) * len(at.index)
        for axis, index, wide, kind in zip(param.axes, at.index, wides, param.strided.strides, strict=True):
            if not index.terms and not index.start and (at.tensor, index) not in self.starts:
                continue
            text, level = self.index(at.tensor, index, axes, wide)
            if axis in single and any(v.axes for v in index.values):
                factor = "0"  # as neighbours in memory its masked lanes would decide how all is loaded: one by one
            else:
                factor = "" if kind == "unit" else stride(at.tensor, axis or "")
            text = text if level >= TIMES or not factor else f"({text})"
            terms.append(f"{text} * {factor}" if factor else text)
        return " + ".join(terms)

    def index(self, tensor: str, index: t.Index, axes: tuple[str, ...], wide: bool) -> Text:
        """One index of an access: a sum, whose first term makes it one of 64 bits."""
        start, terms = self.starts.get((tensor, index), str(index.start)), []
        for value, step in index.terms:
            text = self.at(value, axes)
            if wide and not terms:
                plain = value in self.inline or self.names.owner(value) in self.counted
                text = f"tl.cast({text}, tl.int64)" if plain else f"{text}.to(tl.int64)"
            terms.append(f"{text} * {step}" if step != 1 else text)
        if not terms:
            return (f"tl.cast({start}, tl.int64)" if wide else start), ATOM
        terms += [start] if start != "0" else []
        return " + ".join(terms), PLUS if len(terms) > 1 else TIMES if index.terms[0][1] != 1 else ATOM


def _load(p: TritonPrinter, op: t.Load) -> str:
    axes = op.out.axes
    mask = p.mask(op.at, axes)
    fill = number(float(op.fill) if op.out.dtype in STORED else op.fill)  # which Triton makes of no integer
    return f"tl.load({p.pointer(op.at, axes)}{f', mask={mask}, other={fill}' if mask else ''})"


def _binary(p: TritonPrinter, op: t.Binary) -> str | Text:
    if op.op == "mul" and op.out in p.summands:
        a, b = p.pair(op)  # a lane would make an fma of its product and its neighbour's, so that two had two sums
        return f"tl.fma({a}, {b}, 0.0)"
    if op.op not in ("maximum", "minimum"):
        return p.operator(op)
    a, b = p.pair(op)
    return f"tl.{op.op}({a}, {b}{', propagate_nan=tl.PropagateNan.ALL' if is_extreme(op) else ''})"


def _reduce(p: TritonPrinter, op: t.Reduce) -> str:
    axis = op.value.axes.index(op.axis)
    if is_extreme(op):
        p.helpers.add(f"nan_{op.op}")
        return f"tl.reduce({p.text(op.value)}, {axis}, nan_{op.op})"
    return f"tl.{op.op}({p.text(op.value)}, axis={axis})"


def _dot(p: TritonPrinter, op: t.Dot) -> str:
    m, n = op.out.axes
    left = p.text(op.left) if op.left.axes == (m, op.axis) else f"tl.trans({p.text(op.left)})"
    right = p.text(op.right) if op.right.axes == (op.axis, n) else f"tl.trans({p.text(op.right)})"
    acc = f", {p.text(op.acc)}" if op.acc is not None else ""
    return f'tl.dot({left}, {right}{acc}, input_precision="ieee")'


def _halves(p: TritonPrinter, op: t.Halves) -> str:
    """Both halves lie in the same lanes, so that taking them apart moves nothing."""
    shape: list[int] = []
    for a, n in zip(op.value.axes, p.program.block(op.value.axes), strict=True):
        shape += [2, n // 2] if a == op.axis else [n]
    at, of = op.value.axes.index(op.axis), p.program.axis(op.axis).of
    named = [of if a == op.axis else a for a in op.value.axes]
    places = [i + (i >= at) for i in map(named.index, op.outs[0].axes)]
    return f"tl.split(tl.permute(tl.reshape({_side_by_side(p, op, at)}, {tuple(shape)}), {(*places, at)}))"


def _side_by_side(p: TritonPrinter, op: t.Halves, at: int) -> str:
    """A block of which strips of either half come in turn, each half's together."""
    block, (n, strip) = p.program.block(op.value.axes), ((a := p.program.axis(op.axis)).block, a.strip)
    if n == 2 * strip:
        return p.text(op.value)
    apart, order = (*block[:at], n // (2 * strip), 2, strip, *block[at + 1 :]), [*range(len(block) + 2)]
    order[at : at + 2] = at + 1, at
    return f"tl.reshape(tl.permute(tl.reshape({p.text(op.value)}, {apart}), {tuple(order)}), {block})"


def _deinterleave(p: TritonPrinter, op: t.Deinterleave) -> str:
    *outer, last = p.program.block(op.value.axes)
    n, split = len(op.outs), "tl.split"
    if n > 2:
        p.helpers.add(split := "split_4")
    pairs = [2] * (n.bit_length() - 1)
    return f"{split}(tl.reshape({p.text(op.value)}, {(*outer, last // n, *pairs)}))"


def _interleave(p: TritonPrinter, op: t.Interleave) -> str:
    return woven([p.text(v) for v in op.values], "tl.interleave({}, {})")


def _ways(p: TritonPrinter, op: t.Ways) -> str:
    return f"({', '.join(f'tl.load({op.tensor}_ptr + {i})' for i in range(len(op.outs)))})"


EXPRESSIONS: dict[type, Callable[[TritonPrinter, Any], str | Text]] = {
    **COMMON,
    **PACKETS,
    t.Halves: _halves,
    t.Deinterleave: _deinterleave,
    t.Interleave: _interleave,
    t.Load: _load,
    t.Binary: _binary,
    t.Reduce: _reduce,
    t.Dot: _dot,
    t.Ways: _ways,
}


# Programmatic dependent launch: the next kernel's programs may start, and wait, while this one's still run. They may at once;
# but where this one asks for memory ahead only after its own wait, or they would take the room of the programs that use it
# (a gate GEMM, 2048 to 648, T = 1, on an H200: 3.2 us, else 3.9 and much varying).
TRIGGER, WAIT = "gdc_launch_dependents()", "gdc_wait()"
OVERLAP = f"    if PDL:\n        {TRIGGER}\n        {WAIT}"


def emit(kernel: t.Kernel) -> str:
    """The source of one kernel: imports, helpers it needs, and a `@triton.jit` function called `<name>_kernel`.

    Its last argument, `PDL`, says whether it is launched with programmatic dependent launch (compute capability 9.0 and later).
    """
    alone, ahead, shared = len(kernel.sections) == 1, _asks_ahead(kernel), helpers(kernel)
    pid = "pid" if _numbered(kernel) else "tl.program_id(0)"
    printers = [TritonPrinter(h.section, EXPRESSIONS, pid, h.starts) for h in shared]
    bodies = [[*_alignment_hints(p.program), *p.whole(ahead)] for p in printers]
    lines = [*header(kernel, __version__), "import triton", "import triton.language as tl", IMPORT, ""]
    for name in sorted({h for p in printers for h in p.helpers}):
        lines += ["", HELPERS[name]]
    for helper, body in zip(shared, bodies, strict=True) if not alone else ():
        told = [f"{name}: tl.constexpr" for name in helper.starts.values()]
        takes = ["pid", *(a.name for a in arguments(helper.section)), *told, *(["PDL: tl.constexpr"] if ahead else [])]
        lines += ["", "@triton.jit", f"def {helper.section.name}(", *_wrapped(takes), "):", *body, ""]
    args = arguments(kernel)
    fixed = [a.name for a in args if a.kind != "pointer"]
    lines += ["", f"@triton.jit(do_not_specialize={fixed!r})" if fixed else "@triton.jit", f"def {kernel_name(kernel)}("]
    lines += [*_wrapped([*(a.name for a in args), "PDL: tl.constexpr"]), "):", *([] if ahead else [OVERLAP])]
    lines += ["    pid = tl.program_id(0)"] if _numbered(kernel) else []
    return "\n".join([*lines, *(bodies[0] if alone else _sections(kernel, shared)), ""])


def _numbered(kernel: t.Kernel) -> bool:
    """Whether the number of a program has a name: it is decoded, or handed on."""
    return len(kernel.sections) > 1 or sum(n != 1 for s in kernel.sections for n in s.counts) > 1


def _asks_ahead(kernel: t.Kernel) -> bool:
    """Whether some program asks for memory before the launches before it have ended: then each section waits by itself."""
    return any(isinstance(op, t.Prefetch) for s in kernel.sections for op in s.body)


IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait"


def _sections(kernel: t.Kernel, shared: tuple[Helper, ...]) -> list[str]:
    """Which programs of a launch belong to which section."""
    lines, last = [], ["PDL"] if _asks_ahead(kernel) else []
    for call in calls(kernel, shared, TritonPrinter):
        passed = [call.own, *(a.name for a in arguments(call.section)), *map(str, call.starts), *last]
        lines += [*call.before, f"    if {call.inside}:", *_call(call.helper, passed)]
    return lines


def _call(name: str, passed: list[str]) -> list[str]:
    """A call of a section, on as many lines as it takes."""
    line = f"        {name}({', '.join(passed)})"
    if len(line) <= LONGEST:
        return [line]
    return [f"        {name}(", *("        " + each for each in _wrapped(passed)), "        )"]


def _wrapped(names: list[str]) -> list[str]:
    lines, row = [], "   "
    for name in names:
        if len(row) + len(name) > 110:
            lines.append(row)
            row = "   "
        row += f" {name},"
    return [*lines, row]


def _alignment_hints(program: t.TileProgram) -> list[str]:
    """Strides in elements, from those that came in units of 16 bytes."""
    scaled = [a for a in arguments(program) if a.unit > 1]
    return [f"    {stride(a.subject, program.param(a.subject).axes[a.dim] or '')} = {a.name} * {a.unit}" for a in scaled]
