"""TileProgram → Triton source: a table from operation to text. Needs neither triton nor torch to print."""

from __future__ import annotations

from dataclasses import dataclass
from math import copysign, prod

from moekit import __version__
from moekit.backends.printer import Printer, blocks, extent_text, header, number
from moekit.compile import tile as t
from moekit.compile.naming import extent_name, identifier
from moekit.lang.dtypes import is_float, itemsize

DTYPES = {
    "float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16", "int64": "tl.int64", "int32": "tl.int32",
    "int16": "tl.int16", "int8": "tl.int8", "bool": "tl.int1",
}  # fmt: skip

BINARY = {
    "add": "({a} + {b})", "sub": "({a} - {b})", "mul": "({a} * {b})", "div": "({a} / {b})",
    "floordiv": "({a} // {b})", "rem": "({a} % {b})",
    "and": "({a} & {b})", "or": "({a} | {b})", "xor": "({a} ^ {b})", "shl": "({a} << {b})", "shr": "({a} >> {b})",
    "eq": "({a} == {b})", "ne": "({a} != {b})", "lt": "({a} < {b})", "le": "({a} <= {b})", "gt": "({a} > {b})",
    "ge": "({a} >= {b})",
}  # fmt: skip
UNARY = {
    "neg": "(-{a})", "not": "(~{a})", "exp": "tl.exp({b})", "log": "tl.log({b})", "sqrt": "tl.sqrt({b})",
    "rsqrt": "tl.rsqrt({b})", "abs": "tl.abs({b})", "sigmoid": "tl.sigmoid({b})",
}  # fmt: skip

HELPERS = {
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
        for d, axis in enumerate(p.axes):
            if axis is None or p.strided.strides[d] == "unit":
                continue
            unit = 16 // itemsize(p.dtype) if p.strided.strides[d] == "aligned" else 1
            suffix = f"_by{unit}" if unit > 1 else ""
            args.append(Argument(stride(p.name, axis) + suffix, "stride", p.name, d, unit))
    return tuple(args)


def kernel_name(program: t.Kernel) -> str:
    """The name of the emitted function."""
    return f"{program.name}_kernel"


class TritonPrinter(Printer):
    """Loops and stores in Triton."""

    def loop(self, op: t.Loop, depth: int) -> list[str]:
        if op.flat:
            return self.flat_loop(op, depth)
        pad = "    " * depth
        lines = [f"{pad}{c.name} = {self.text(i)}" for c, i in zip(op.carries, op.inits, strict=True)]
        stop = self.text(op.stop) if isinstance(op.stop, t.Value) else op.stop
        if op.unroll:
            lines.append(f"{pad}for turn in tl.static_range(0, {stop}, {op.step}):")
            lines.append(f"{pad}    {op.var.name} = tl.cast(turn, tl.int32)")
        else:
            lines.append(f"{pad}for {op.var.name} in range(0, {stop}, {op.step}):")
        lines += self.body(op.body, depth + 1)
        lines += [f"{pad}    {c.name} = {self.text(y)}" for c, y in zip(op.carries, op.yields, strict=True)]
        self.inline |= {o.name: c.name for o, c in zip(op.outs, op.carries, strict=True)}
        return lines

    def flat_loop(self, op: t.Loop, depth: int) -> list[str]:
        """A loop and the one in its body as one `for`: what stands after the inner one is done in the last of its turns.

        Triton's software pipeline, and a wgmma on its way, then go on over the end of the inner loop.
        """
        pad = "    " * depth
        at, inner = next((i, o) for i, o in enumerate(op.body) if isinstance(o, t.Loop))
        begin = [o for o in op.body[:at] if isinstance(o, t.Full)]
        turns = inner.turns
        lines = [f"{pad}{c.name} = {self.text(i)}" for c, i in zip(op.carries, op.inits, strict=True)]
        lines += self.body(begin, depth)
        first = [f"{c.name} = {self.text(i)}" for c, i in zip(inner.carries, inner.inits, strict=True)]
        lines += [pad + line for line in first]
        lines.append(f"{pad}for turn in range(0, {op.turns * turns}):")
        for var, turn, step in ((op.var, f"turn // {turns}", op.step), (inner.var, f"turn % {turns}", inner.step)):
            lines.append(f"{pad}    {var.name} = {turn}" + (f" * {step}" if step != 1 else ""))
        lines += self.body([o for o in op.body[:at] if o not in begin], depth + 1)
        lines += self.body(inner.body, depth + 1)
        lines += [f"{pad}    {c.name} = {self.text(y)}" for c, y in zip(inner.carries, inner.yields, strict=True)]
        self.inline |= {o.name: c.name for o, c in zip(inner.outs, inner.carries, strict=True)}
        lines.append(f"{pad}    if turn % {turns} == {turns - 1}:")
        lines += self.body(op.body[at + 1 :], depth + 2)
        lines += [f"{pad}        {c.name} = {self.text(y)}" for c, y in zip(op.carries, op.yields, strict=True)]
        lines += [f"{pad}        {line}" for line in first]
        self.inline |= {o.name: c.name for o, c in zip(op.outs, op.carries, strict=True)}
        return lines

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
        axes, param = self.store_axes(op), self.program.param(op.tensor)
        step = t.LINE // itemsize(param.dtype)
        lanes = f"tl.arange(0, {op.size // step})"
        lanes = f"{lanes}[{', '.join(['None'] * len(axes) + [':'])}] * {step}" if axes else f"{lanes} * {step}"
        lines = f"{self.pointer(op, (*axes, ''))} + {lanes}"
        self.helpers.add("prefetch")
        return f"prefetch({f'tl.where({self.at(op.mask, (*axes, ""))}, {lines}, {op.tensor}_ptr)' if op.mask else lines})"

    def store(self, op: t.Store) -> str:
        axes = self.store_axes(op)
        value = (
            self.text(op.value) if op.value.axes == axes else f"tl.broadcast_to({self.at(op.value, axes)}, {self.shape(axes)})"
        )
        mask = f", mask={self.at(op.mask, axes)}" if op.mask is not None else ""
        return f"tl.store({self.pointer(op, axes)}, {value if op.value.axes or not axes else self.text(op.value)}{mask})"

    def pointer(self, op, axes: tuple[str, ...]) -> str:
        """The block of addresses: the pointer and one term per dimension, in 64 bits where the operation says so."""
        param = self.program.param(op.tensor)
        terms, single = [f"{op.tensor}_ptr"], {a.name for a in self.program.axes if a.extent == 1}
        for axis, v, wide, kind in zip(param.axes, op.index, op.wide, param.strided.strides, strict=True):
            if v is None:
                continue
            index = self.at(v, axes)
            if wide:
                index = f"{index}.to(tl.int64)" if v.name not in self.inline or "[" in index else f"tl.cast({index}, tl.int64)"
            if v.axes and axis in single:  # as neighbours in memory its masked lanes would decide how all is loaded: one by one
                terms.append(f"{index} * 0")
                continue
            terms.append(index if kind == "unit" else f"{index} * {stride(op.tensor, axis or '')}")
        return " + ".join(terms)


def _load(p: TritonPrinter, op: t.Load) -> str:
    axes = op.out.axes
    mask = f", mask={p.at(op.mask, axes)}, other={number(op.fill)}" if op.mask is not None else ""
    return f"tl.load({p.pointer(op, axes)}{mask})"


def _binary(p: Printer, op: t.Binary) -> str:
    a, b = p.at(op.left, op.out.axes), p.at(op.right, op.out.axes)
    a = p.typed(op.left) if {op.left.name, op.right.name} <= p.literals else a
    if op.op in ("maximum", "minimum"):
        nan = ", propagate_nan=tl.PropagateNan.ALL" if is_float(op.left.dtype) else ""
        return f"tl.{op.op}({a}, {b}{nan})"
    return BINARY[op.op].format(a=a, b=b)


def _reduce(p: Printer, op: t.Reduce) -> str:
    axis = op.value.axes.index(op.axis)
    if op.op != "sum" and is_float(op.value.dtype):
        p.helpers.add(f"nan_{op.op}")
        return f"tl.reduce({p.arg(op.value)}, {axis}, nan_{op.op})"
    return f"tl.{op.op}({p.arg(op.value)}, axis={axis})"


def _dot(p: Printer, op: t.Dot) -> str:
    m, n = op.out.axes
    left = p.text(op.left) if op.left.axes == (m, op.axis) else f"tl.trans({p.text(op.left)})"
    right = p.text(op.right) if op.right.axes == (op.axis, n) else f"tl.trans({p.text(op.right)})"
    acc = f", {p.text(op.acc)}" if op.acc is not None else ""
    return f'tl.dot({left}, {right}{acc}, input_precision="ieee")'


def _index(p: Printer, op: t.Index) -> str:
    start = p.text(op.start) if op.start is not None else ""
    if not op.out.axes:
        return start or "0"
    block = p.program.axis(op.axis).block
    lanes = f"tl.arange(0, {block})" if op.out.axes == (op.axis,) else f"tl.arange(0, {2 * block}) % {block}"
    return f"({start} + {lanes})" if start else f"({lanes})" if " " in lanes else lanes


def _sides(p: Printer, op: t.Sides) -> str:
    block = p.program.axis(op.axis).block
    return f"tl.where(tl.arange(0, {block}) < {block // 2}, {op.values[0]}, {op.values[1]})"


def _half(p: Printer, op: t.Half) -> str:
    """Both halves lie in the same lanes, so that taking them apart moves nothing."""
    shape: list[int] = []
    for a, n in zip(op.value.axes, p.program.block(op.value.axes), strict=True):
        shape += [2, n // 2] if a == op.axis else [n]
    at, of = op.value.axes.index(op.axis), p.program.axis(op.axis).of
    named = [of if a == op.axis else a for a in op.value.axes]
    places = [i + (i >= at) for i in map(named.index, op.out.axes)]
    return f"tl.split(tl.permute(tl.reshape({p.text(op.value)}, {tuple(shape)}), {(*places, at)}))[{op.side}]"


def _program_id(p: Printer, op: t.ProgramId) -> str:
    return p.program_id(op.axis, "({} // {})", "{} % {}", lambda axis: _count(p.program, axis))


def _count(program: t.TileProgram, axis: str) -> str:
    """How many blocks an axis has."""
    block, extent = program.axis(axis).block, extent_text(program, axis)
    return blocks(program, axis, f"tl.cdiv({extent}, {block})" if block > 1 else extent)


def _where(p: Printer, op: t.Where) -> str:
    axes = op.out.axes
    condition = p.typed(op.condition) if op.condition.name in p.literals else p.at(op.condition, axes)
    return f"tl.where({condition}, {p.at(op.yes, axes)}, {p.at(op.no, axes)})"


def _const(p: Printer, op: t.Const) -> str:
    """A literal, but for -0.0 (of which Triton 3.6 makes 0.0) and where a literal would be of another dtype."""
    if isinstance(op.value, float) and op.value == 0 and copysign(1, op.value) < 0:
        bits = 8 * itemsize(op.out.dtype)
        return f"tl.full((), {-(2 ** (bits - 1))}, tl.int{bits}).to({DTYPES[op.out.dtype]}, bitcast=True)"
    narrow = op.out.dtype in ("float16", "bfloat16")
    return f"tl.full((), {number(op.value)}, {DTYPES[op.out.dtype]})" if narrow else number(op.value)


EXPRESSIONS = {
    t.Const: _const,
    t.Full: lambda p, op: f"tl.full({p.shape(op.out.axes)}, {number(op.value)}, {DTYPES[op.out.dtype]})",
    t.ProgramId: _program_id,
    t.Extent: lambda p, op: extent_text(p.program, op.axis),
    t.Index: _index,
    t.Sides: _sides,
    t.Half: _half,
    t.InBounds: lambda p, op: f"({p.text(op.index)} < {extent_text(p.program, op.axis)})",
    t.Load: _load,
    t.Cast: lambda p, op: f"{p.typed(op.value)}.to({DTYPES[op.out.dtype]})",
    t.Bitcast: lambda p, op: f"{p.typed(op.value)}.to({DTYPES[op.out.dtype]}, bitcast=True)",
    t.Unary: lambda p, op: UNARY[op.op].format(a=p.typed(op.value), b=p.arg(op.value)),
    t.Binary: _binary,
    t.Where: _where,
    t.Reduce: _reduce,
    t.Scan: lambda p, op: f"tl.cumsum({p.text(op.value)}, axis={op.value.axes.index(op.axis)})",
    t.Dot: _dot,
}


# Programmatic dependent launch: the next kernel's programs may start, and wait, while this one's still run. They may at once;
# but where this one asks for memory ahead only after its own wait, or they would take the room of the programs that use it
# (a gate GEMM, 2048 to 648, T = 1, on an H200: 3.2 us, else 3.9 and much varying).
TRIGGER, WAIT = "gdc_launch_dependents()", "gdc_wait()"
OVERLAP = f"    if PDL:\n        {TRIGGER}\n        {WAIT}"
# Programs of a launch from which on those of one warp do without: each has to wait, which then costs more than is saved once. A
# router's best 8 of 256 (10 of 512) on an H200, bfloat16, with dependent launch and without, us: T = 1024: 1.96 and 2.36 (2.78
# and 2.77), 2048: 2.77 and 2.93 (3.84 and 3.49), 4096: 5.30 and 4.21 (5.36 and 4.86), 16384: 20.7 and 11.7 (20.7 and 13.0).
MANY_PROGRAMS = 2048


def dependent(kernel: t.Kernel, programs: int) -> bool:
    """Whether a launch of so many programs gains from dependent launch."""
    return kernel.warps > 1 or programs < MANY_PROGRAMS


def emit(kernel: t.Kernel) -> str:
    """The source of one kernel: imports, helpers it needs, and a `@triton.jit` function called `<name>_kernel`.

    Its last argument, `PDL`, says whether it is launched with programmatic dependent launch (compute capability 9.0 and later).
    """
    alone = len(kernel.sections) == 1
    ahead = _asks_ahead(kernel)
    printers = [TritonPrinter(s, EXPRESSIONS, "tl.program_id(0)" if alone else "pid") for s in kernel.sections]
    bodies = [[*_alignment_hints(p.program), *p.whole(ahead)] for p in printers]
    lines = [*header(kernel, __version__), "import triton", "import triton.language as tl", IMPORT, ""]
    for name in sorted({h for p in printers for h in p.helpers}):
        lines += ["", HELPERS[name]]
    if not alone:
        for section, body in zip(kernel.sections, bodies, strict=True):
            names = ["pid", *(a.name for a in arguments(section)), *(["PDL: tl.constexpr"] if ahead else [])]
            lines += ["", "@triton.jit", f"def {section.name}(", *_wrapped(names), "):", *body, ""]
    args = arguments(kernel)
    fixed = [a.name for a in args if a.kind != "pointer"]
    lines += ["", f"@triton.jit(do_not_specialize={fixed!r})" if fixed else "@triton.jit", f"def {kernel_name(kernel)}("]
    lines += _wrapped([*(a.name for a in args), "PDL: tl.constexpr"])
    return "\n".join([*lines, "):", *([] if ahead else [OVERLAP]), *(bodies[0] if alone else _programs(kernel)), ""])


def _asks_ahead(kernel: t.Kernel) -> bool:
    """Whether some program asks for memory before the launches before it have ended: then each section waits by itself."""
    return any(isinstance(op, t.Prefetch) for s in kernel.sections for op in s.body)


IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait"


def _programs(kernel: t.Kernel) -> list[str]:
    """Which programs of a launch belong to which section."""
    return _abreast(kernel) if isinstance(kernel, t.Joined) and kernel.abreast else _in_turn(kernel)


def _in_turn(kernel: t.Kernel) -> list[str]:
    """First all programs of the first section, and so on."""
    lines, begin = ["    pid = tl.program_id(0)"], "0"
    for i, section in enumerate(kernel.sections):
        counts = [_count(section, a) for a in section.grid]
        end, call = f"end_{i}", _passed(kernel, section)
        lines.append(f"    {end} = {begin} + {' * '.join(c for c in counts if c != '1') or '1'}".replace(" 0 +", ""))
        inside = f"(pid >= {begin}) & (pid < {end})" if i else f"pid < {end}"
        lines += [f"    if {inside}:", f"        {section.name}(pid{f' - {begin}' if i else ''}, {call})"]
        begin = end
    return lines


def _abreast(kernel: t.Kernel) -> list[str]:
    """For each block of the outermost axis the programs of every section."""
    each = [prod(s.axis(a).blocks for a in s.grid[1:]) for s in kernel.sections]
    lines, low = ["    pid = tl.program_id(0)"], 0
    for section, count in zip(kernel.sections, each, strict=True):
        at, high = f"pid % {sum(each)}", low + count
        inside = f"({at} >= {low}) & ({at} < {high})" if low else f"{at} < {high}"
        number = f"pid // {sum(each)} * {count} + {at}" + (f" - {low}" if low else "")
        lines += [f"    if {inside}:", f"        {section.name}({number}, {_passed(kernel, section)})"]
        low = high
    return lines


def _passed(kernel: t.Kernel, section: t.TileProgram) -> str:
    """What a section is called with beside the number of its program."""
    return ", ".join([*(a.name for a in arguments(section)), *(["PDL"] if _asks_ahead(kernel) else [])])


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
