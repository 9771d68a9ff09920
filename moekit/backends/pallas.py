"""TileProgram → Pallas source (Triton lowering): a table from operation to text. Needs no jax to print.

Operands are whole arrays in global memory (`memory_space=pl.ANY`), indexed per axis, so a view is start + step·i along each
axis of its base and nothing is ever sliced before the kernel.
"""

from __future__ import annotations

import re

from moekit import __version__
from moekit.backends.printer import Printer, _bare, blocks, extent_text, header, number
from moekit.compile import tile as t
from moekit.lang.dtypes import is_float

DTYPES = {
    "float32": "jnp.float32", "float16": "jnp.float16", "bfloat16": "jnp.bfloat16", "int64": "jnp.int64",
    "int32": "jnp.int32", "int16": "jnp.int16", "int8": "jnp.int8", "bool": "jnp.bool_",
}  # fmt: skip
BINARY = {
    "add": "({a} + {b})", "sub": "({a} - {b})", "mul": "({a} * {b})", "div": "({a} / {b})",
    "floordiv": "trunc_div({a}, {b})", "rem": "trunc_rem({a}, {b})",
    "and": "({a} & {b})", "or": "({a} | {b})", "xor": "({a} ^ {b})", "shl": "({a} << {b})", "shr": "({a} >> {b})",
    "eq": "({a} == {b})", "ne": "({a} != {b})", "lt": "({a} < {b})", "le": "({a} <= {b})", "gt": "({a} > {b})",
    "ge": "({a} >= {b})",
}  # fmt: skip
UNARY = {
    "neg": "(-{a})", "not": "(~{a})", "exp": "jnp.exp({b})", "log": "jnp.log({b})", "sqrt": "jnp.sqrt({b})",
    "rsqrt": "lax.rsqrt({b})", "abs": "jnp.abs({b})", "sigmoid": "lax.logistic({b})",
}  # fmt: skip

# What Pallas's Triton lowering has no word for. Its maximum and minimum drop NaN, so floats are compared as the integers
# that sort as they do, with NaN at the end that wins.
HELPERS = {
    "trunc_div": """def trunc_div(a, b):
    dtype = jnp.result_type(a, b)
    return lax.div(*jnp.broadcast_arrays(jnp.asarray(a, dtype), jnp.asarray(b, dtype)))
""",
    "trunc_rem": """def trunc_rem(a, b):
    dtype = jnp.result_type(a, b)
    return lax.rem(*jnp.broadcast_arrays(jnp.asarray(a, dtype), jnp.asarray(b, dtype)))
""",
    "nan_maximum": """def nan_maximum(a, b):
    return jnp.where(a != a, a, jnp.where(b != b, b, jnp.maximum(a, b)))
""",
    "nan_minimum": """def nan_minimum(a, b):
    return jnp.where(a != a, a, jnp.where(b != b, b, jnp.minimum(a, b)))
""",
    "nan_max": """def nan_max(x, axis):
    bits = lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(x != x, 0x7FFFFFFF, jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))
    best = jnp.max(key, axis=axis)
    return lax.bitcast_convert_type(jnp.where(best >= 0, best, best ^ 0x7FFFFFFF), jnp.float32)
""",
    "nan_min": """def nan_min(x, axis):
    bits = lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(x != x, -0x80000000, jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))
    best = jnp.min(key, axis=axis)
    return lax.bitcast_convert_type(jnp.where(best >= 0, best, best ^ 0x7FFFFFFF), jnp.float32)
""",
}


def buffers(program: t.Kernel) -> tuple[list[str], list[str]]:
    """The arrays a kernel reads and the arrays it writes, each once; one in both lists is aliased."""
    read, written = [], []
    for p in program.params:
        if p.role != "Out" or p.viewed.buffer != p.name:
            read.append(p.viewed.buffer)
        read += [picked for _, picked in p.viewed.picked]
        if p.role != "In":
            written.append(p.viewed.buffer)
    return list(dict.fromkeys(read)), list(dict.fromkeys(written))


def kernel_name(program: t.Kernel) -> str:
    """The name of the emitted function."""
    return f"{program.name}_kernel"


class PallasPrinter(Printer):
    """Loops, stores and helpers in Pallas."""

    def helper(self, name: str) -> str:
        """Note that a helper is needed."""
        self.helpers.add(name)
        return name

    def loop(self, op: t.Loop, depth: int) -> list[str]:
        if op.flat:
            return self.flat_loop(op, depth)
        pad, name = "    " * depth, f"{op.var.name}_body"
        carried = ", ".join(c.name for c in op.carries)
        lines = [f"{pad}def {name}(turn, carry):"]
        lines.append(f"{pad}    {op.var.name} = turn * {op.step}" if op.step != 1 else f"{pad}    {op.var.name} = turn")
        if carried:
            lines.append(f"{pad}    {carried}{',' * (len(op.carries) == 1)} = carry")
        lines += self.body(op.body, depth + 1)
        yields = ", ".join(self.text(y) for y in op.yields)
        lines.append(f"{pad}    return ({yields}{',' * (len(op.yields) == 1)})")
        if op.unroll:
            return self.written_out(op, pad, name, lines)
        turns = f"pl.cdiv({self.text(op.stop)}, {op.step})" if isinstance(op.stop, t.Value) else op.turns
        inits = ", ".join(self.text(i) for i in op.inits)
        outs = ", ".join(o.name for o in op.outs)
        left = f"{outs}{',' * (len(op.outs) == 1)} = " if outs else ""
        lines += ["", f"{pad}{left}lax.fori_loop(0, {turns}, {name}, ({inits}{',' * (len(op.inits) == 1)}))"]
        return lines

    def flat_loop(self, op: t.Loop, depth: int) -> list[str]:
        """A loop and the one in its body as one: what stands after the inner one is done in the last of its turns."""
        pad, name = "    " * depth, f"{op.var.name}_body"
        at, inner = next((i, o) for i, o in enumerate(op.body) if isinstance(o, t.Loop))
        begin = [o for o in op.body[:at] if isinstance(o, t.Full)]
        turns = inner.turns
        lines = [*self.body(begin, depth), f"{pad}def {name}(turn, carry):"]
        first = [self.text(i) for i in inner.inits]
        for var, turn, step in ((op.var, f"lax.div(turn, jnp.int32({turns}))", op.step),
                                (inner.var, f"lax.rem(turn, jnp.int32({turns}))", inner.step)):  # fmt: skip
            lines.append(f"{pad}    {var.name} = {turn}" + (f" * {step}" if step != 1 else ""))
        lines.append(f"{pad}    {', '.join(c.name for c in (*op.carries, *inner.carries))} = carry")
        lines += self.body([o for o in op.body[:at] if o not in begin], depth + 1)
        lines += self.body(inner.body, depth + 1)
        lines += [f"{pad}    {o.name} = {self.text(y)}" for o, y in zip(inner.outs, inner.yields, strict=True)]
        lines += ["", f"{pad}    def ended():", *self.body(op.body[at + 1 :], depth + 2)]
        lines += [f"{pad}        return {', '.join([*(self.text(y) for y in op.yields), *first])}", ""]
        goes_on = ", ".join(v.name for v in (*op.carries, *inner.outs))
        lines += [f"{pad}    return lax.cond(lax.rem(turn, jnp.int32({turns})) == {turns - 1}, ended, lambda: ({goes_on}))", ""]
        outs = ", ".join([*(o.name for o in op.outs), *("_" for _ in inner.outs)])
        inits = ", ".join([*(self.text(i) for i in op.inits), *first])
        return [*lines, f"{pad}{outs} = lax.fori_loop(0, {op.turns * turns}, {name}, ({inits}))"]

    def written_out(self, op: t.Loop, pad: str, name: str, lines: list[str]) -> list[str]:
        """The turns of a loop one after the other. A turn's number is traced, for the reason `constant` gives."""
        carry = f"{op.var.name}_carry"
        inits = ", ".join(self.text(i) for i in op.inits)
        outs = ", ".join(o.name for o in op.outs) + "," * (len(op.outs) == 1)
        lines += ["", f"{pad}{carry} = ({inits}{',' * (len(op.inits) == 1)})"]
        lines += [f"{pad}for turn in range(0, {op.stop}, {op.step}):"]
        return [*lines, f"{pad}    {carry} = {name}({self.pid} * 0 + turn, {carry})", f"{pad}{outs} = {carry}"]

    def scalar(self, literal: str, dtype: str) -> str:
        """A literal that is traced: the GPU lowering has no rule for operations on literals alone. Of a float one times it, as

        nothing plus -0.0 is 0.0.
        """
        zero = f"{self.pid} * 0"
        if is_float(dtype):
            return f"(({zero} + 1).astype({DTYPES[dtype]}) * {literal})"
        return f"({zero} + {literal})" if dtype == "int32" else f"({zero} + {literal}).astype({DTYPES[dtype]})"

    def store(self, op: t.Store) -> str:
        axes = self.store_axes(op)
        written = self.program.param(op.tensor).viewed.buffer
        ref = f"{written}_out_ref" if written in buffers(self.program)[0] else f"{written}_ref"
        value = self.block(op.value, axes)
        mask = f", mask={self.block(op.mask, axes)}" if op.mask is not None else ""
        return f"plt.store({ref}.at[{self.index(op, axes)}], {value}{mask})"

    def block(self, value: t.Value, axes: tuple[str, ...]) -> str:
        """A value as a full block over `axes`."""
        if value.axes == axes:
            return self.arg(value)
        return f"jnp.broadcast_to({self.at(value, axes)}, {self.shape(axes)})"

    def index(self, op, axes: tuple[str, ...]) -> str:
        """One index per axis of the base array."""
        layout = self.program.param(op.tensor).viewed
        texts = {axis: self.constant(at, axes) for axis, at in layout.fixed}
        texts |= {axis: f"jnp.full({self.shape(axes)}, {at}, jnp.int32)" if axes else at for axis, at in layout.picked}
        for v, axis, start, step in zip(op.index, layout.axes, layout.starts, layout.steps, strict=True):
            text = "0" if v is None else self.at(v, axes)
            if text.isdecimal():
                texts[axis] = self.constant(int(text) * step + start, axes)
                continue
            text = f"{text} * {step}" if step != 1 else text
            texts[axis] = f"{text} + {start}" if start else text
        return ", ".join(texts[axis] for axis in range(len(layout.base))) or "..."

    def constant(self, at: int, axes: tuple[str, ...]) -> str:
        """A fixed index, traced: JAX 0.11's interpret mode refuses a literal beside a mask."""
        return f"jnp.full({self.shape(axes)}, {at}, jnp.int32)" if axes else f"{self.pid} * 0 + {at}"


def _load(p: PallasPrinter, op: t.Load) -> str:
    axes = op.out.axes
    ref = f"{p.program.param(op.tensor).viewed.buffer}_ref"
    fill = number(bool(op.fill) if op.out.dtype == "bool" else op.fill)
    mask = f", mask={p.block(op.mask, axes)}, other={fill}" if op.mask is not None else ""
    return f"plt.load({ref}.at[{p.index(op, axes)}]{mask})"


def _binary(p: PallasPrinter, op: t.Binary) -> str:
    a, b = p.at(op.left, op.out.axes), p.at(op.right, op.out.axes)
    a = p.typed(op.left) if {op.left.name, op.right.name} <= p.literals else a
    if op.op in ("maximum", "minimum"):
        name = p.helper(f"nan_{op.op}") if is_float(op.left.dtype) else f"jnp.{op.op}"
        return f"{name}({a}, {b})"
    text = BINARY[op.op].format(a=a, b=b)
    if text.startswith("trunc"):
        p.helper(text[: text.index("(")])
    return text


def _reduce(p: PallasPrinter, op: t.Reduce) -> str:
    axis = op.value.axes.index(op.axis)
    if op.op != "sum" and is_float(op.value.dtype):
        return f"{p.helper(f'nan_{op.op}')}({p.arg(op.value)}, {axis})"
    dtype = f", dtype={DTYPES[op.out.dtype]}" if op.op == "sum" else ""
    return f"jnp.{op.op}({p.arg(op.value)}, axis={axis}{dtype})"


def _dot(p: PallasPrinter, op: t.Dot) -> str:
    m, n = op.out.axes
    left = p.text(op.left) if op.left.axes == (m, op.axis) else f"{p.text(op.left)}.T"
    right = p.text(op.right) if op.right.axes == (op.axis, n) else f"{p.text(op.right)}.T"
    product = f'jnp.dot({left}, {right}, precision="highest", preferred_element_type=jnp.float32)'
    return product if op.acc is None else f"{p.text(op.acc)} + {product}"


def _index(p: PallasPrinter, op: t.Index) -> str:
    start = p.text(op.start) if op.start is not None else ""
    if not op.out.axes:
        return start or "0"
    lanes = f"jnp.arange({p.program.axis(op.axis).block}, dtype=jnp.int32)"
    if op.out.axes != (op.axis,):
        block = p.program.axis(op.axis).block
        lanes = f"lax.rem(jnp.arange({2 * block}, dtype=jnp.int32), jnp.int32({block}))"
    return f"({start} + {lanes})" if start else lanes


def _sides(p: PallasPrinter, op: t.Sides) -> str:
    block = p.program.axis(op.axis).block
    first, second = (f"jnp.int32({v})" for v in op.values)
    return f"jnp.where(jnp.arange({block}, dtype=jnp.int32) < {block // 2}, {first}, {second})"


def _half(p: PallasPrinter, op: t.Half) -> str:
    of = p.program.axis(op.axis).of
    named = [of if a == op.axis else a for a in op.value.axes]
    order = tuple(map(named.index, op.out.axes))
    half = f"jnp.split({p.text(op.value)}, 2, axis={op.value.axes.index(op.axis)})[{op.side}]"
    return half if order == tuple(range(len(order))) else f"jnp.transpose({half}, {order})"


def _program_id(p: PallasPrinter, op: t.ProgramId) -> str:
    div, rem = "lax.div({}, jnp.int32({}))", "lax.rem({}, jnp.int32({}))"
    return p.program_id(op.axis, div, rem, lambda axis: blocks(p.program, axis, "0"))


def _where(p: PallasPrinter, op: t.Where) -> str:
    axes = op.out.axes
    condition = p.typed(op.condition) if op.condition.name in p.literals else p.at(op.condition, axes)
    # JAX 0.11's Triton lowering gives a literal beside a loop's own number its own type, and two of them the condition's
    literals = {op.yes.name, op.no.name} <= p.literals
    whole = not axes and (literals or op.out.dtype not in ("bool", "float32", "float16", "bfloat16"))
    yes, no = (p.typed(v) if whole else p.at(v, axes) for v in (op.yes, op.no))
    return f"jnp.where({condition}, {yes}, {no})"


def _const(p: PallasPrinter, op: t.Const) -> str:
    plain = op.out.dtype in ("float32", "int32", "bool")
    return number(op.value) if plain else f"{DTYPES[op.out.dtype]}({number(op.value)})"


EXPRESSIONS = {
    t.Const: _const,
    t.Full: lambda p, op: f"jnp.full({p.shape(op.out.axes)}, {number(op.value)}, {DTYPES[op.out.dtype]})",
    t.ProgramId: _program_id,
    t.Extent: lambda p, op: extent_text(p.program, op.axis),
    t.Index: _index,
    t.Sides: _sides,
    t.Half: _half,
    t.InBounds: lambda p, op: f"({p.text(op.index)} < {extent_text(p.program, op.axis)})",
    t.Load: _load,
    t.Cast: lambda p, op: f"{p.typed(op.value)}.astype({DTYPES[op.out.dtype]})",
    t.Bitcast: lambda p, op: f"lax.bitcast_convert_type({_bare(p.typed(op.value))}, {DTYPES[op.out.dtype]})",
    t.Unary: lambda p, op: UNARY[op.op].format(a=p.typed(op.value), b=p.arg(op.value)),
    t.Binary: _binary,
    t.Where: _where,
    t.Reduce: _reduce,
    t.Scan: lambda p, op: f"lax.cumsum({p.text(op.value)}, axis={op.value.axes.index(op.axis)})",
    t.Dot: _dot,
}


def emit(kernel: t.Kernel) -> str:
    """The source of one kernel: imports, helpers it needs, and a function of refs called `<name>_kernel`.

    The program's number is asked for once, at the top: JAX 0.11's interpret mode does not know it within loops in loops.
    """
    alone = len(kernel.sections) == 1
    printers = [PallasPrinter(s, EXPRESSIONS, "pid") for s in kernel.sections]
    bodies = [[*_picked(p.program), *p.body(p.program.body, 1)] for p in printers]
    lines = [
        *header(kernel, __version__),
        "import jax.numpy as jnp",
        "from jax import lax",
        "from jax.experimental import pallas as pl",
        "from jax.experimental.pallas import triton as plt",
        "",
    ]
    for name in sorted({h for p in printers for h in p.helpers}):
        lines += ["", HELPERS[name]]
    if not alone:
        for section, body in zip(kernel.sections, bodies, strict=True):
            lines += ["", f"def {section.name}({', '.join(['pid', *_refs(section)])}):", *body, ""]
    lines += ["", f"def {kernel_name(kernel)}({', '.join(_refs(kernel))}):"]
    lines += ["    pid = pl.program_id(0)"] if not alone or re.search(r"\bpid\b", "\n".join(bodies[0])) else []
    return "\n".join([*lines, *(bodies[0] if alone else _sections(kernel)), ""])


def _picked(section: t.TileProgram) -> list[str]:
    """What says at run time where some operands lie, each loaded once."""
    names = dict.fromkeys(name for p in section.params for _, name in p.viewed.picked)
    return [f"    {name} = plt.load({name}_ref.at[pid * 0])" for name in names]


def _refs(kernel: t.Kernel) -> list[str]:
    """What a kernel calls its buffers: those it reads, then those it writes."""
    read, written = buffers(kernel)
    return [f"{b}_ref" for b in read] + [f"{b}_out_ref" if b in read else f"{b}_ref" for b in written]


def _sections(kernel: t.Kernel) -> list[str]:
    """Which programs of a launch belong to which section; all sizes are static."""
    if isinstance(kernel, t.Joined) and kernel.abreast:
        return _abreast(kernel)
    lines, begin = [], 0
    for section in kernel.sections:
        end = begin + section.programs({})
        lines += ["", f"    @pl.when((pid >= {begin}) & (pid < {end}))", "    def _():"]
        lines.append(f"        {section.name}({', '.join([f'pid - {begin}', *_refs(section)])})")
        begin = end
    return lines


def _abreast(kernel: t.Joined) -> list[str]:
    """For each block of the outermost axis the programs of every section."""
    first = kernel.sections[0]
    turns = -(-(first.axis(first.grid[0]).extent or 0) // first.axis(first.grid[0]).block)
    each = [s.programs({}) // max(1, turns) for s in kernel.sections]
    turn, at = f"lax.div(pid, jnp.int32({sum(each)}))", f"lax.rem(pid, jnp.int32({sum(each)}))"
    lines, low = [], 0
    for section, count in zip(kernel.sections, each, strict=True):
        lines += ["", f"    @pl.when(({at} >= {low}) & ({at} < {low + count}))", "    def _():"]
        lines.append(f"        {section.name}({', '.join([f'{turn} * {count} + {at} - {low}', *_refs(section)])})")
        low += count
    return lines
