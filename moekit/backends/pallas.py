"""TileProgram → Pallas source (Triton lowering): a table from operation to text. Needs no jax to print.

Operands are whole arrays in global memory (`memory_space=pl.ANY`), indexed per axis, so a view is start + step·i along each
axis of its base and nothing is ever sliced before the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

from moekit import __version__
from moekit.backends import packet_helpers
from moekit.backends.packet_calls import PACKETS
from moekit.backends.printer import (
    ATOM,
    COMMON,
    LOOSEST,
    PLUS,
    Printer,
    Text,
    calls,
    header,
    is_extreme,
    kernel_name,
    number,
    woven,
    wrapped,
)
from moekit.compile import tile as t
from moekit.compile.passes.helpers import Helper, helpers
from moekit.lang.dtypes import STORED, is_float

DTYPES = {
    "float32": "jnp.float32", "float16": "jnp.float16", "bfloat16": "jnp.bfloat16", "int64": "jnp.int64",
    "int32": "jnp.int32", "int16": "jnp.int16", "int8": "jnp.int8", "bool": "jnp.bool_",
    "float8_e4m3fn": "jnp.float8_e4m3fn",
}  # fmt: skip
WORDS = {
    "exp": "jnp.exp({})", "log": "jnp.log({})", "sqrt": "jnp.sqrt({})", "rsqrt": "lax.rsqrt({})", "abs": "jnp.abs({})",
    "sin": "jnp.sin({})", "cos": "jnp.cos({})", "sigmoid": "lax.logistic({})",
    "lanes": "jnp.arange({}, dtype=jnp.int32)", "element": "jnp.int32({})",
    "div": "lax.div({}, jnp.int32({}))", "rem": "lax.rem({}, jnp.int32({}))", "typed": "{1}({0})",
    "full": "jnp.full({}, {}, {})", "broadcast": "jnp.broadcast_to({}, {})", "where": "jnp.where({}, {}, {})",
    "cast": "{}.astype({})", "bitcast": "lax.bitcast_convert_type({}, {})", "cumsum": "lax.cumsum({}, axis={})",
    "there": "{}", "everywhere": "jnp.full({}, True)",
}  # fmt: skip

# What Pallas's Triton lowering has no word for. Its maximum and minimum drop NaN, so floats are compared as the integers
# that sort as they do, with NaN at the end that wins.
HELPERS = packet_helpers.PALLAS | {
    "barrier": """def barrier():
    plt.debug_barrier()
""",
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
    return touched(program.params)


def touched(params: Iterable[t.Param]) -> tuple[list[str], list[str]]:
    """The arrays that tensors lie in: those that are read, and those that are written."""
    read, written = [], []
    for p in params:
        if isinstance(p.layout, t.Mailbox):
            read.append(p.layout.buffer)
            continue
        if p.role != "Out" or p.viewed.buffer != p.name:
            read.append(p.viewed.buffer)
        read += [picked for _, picked in p.viewed.picked]
        if p.role != "In":
            written.append(p.viewed.buffer)
    return list(dict.fromkeys(read)), list(dict.fromkeys(written))


class PallasPrinter(Printer):
    """Loops, stores and helpers in Pallas."""

    words, dtypes, basic = WORDS, DTYPES, ("packets", "elementwise")
    typed_literals = ("float16", "bfloat16", "int64", "int16", "int8")

    def helper(self, name: str) -> str:
        """Note that a helper is needed."""
        self.helpers.add(name)
        return name

    def barrier(self) -> str:
        return f"{self.helper('barrier')}()"

    def loop(self, op: t.Loop, depth: int) -> list[str]:
        pad, name = "    " * depth, f"{self.names[op.vars[0]]}_body"
        axis = self.program.axis(op.over[0]) if isinstance(op.over[0], str) else None
        plain = len(op.over) == 1 and (axis is None or (axis.step == 1 and not axis.beside))
        number = self.names[op.vars[0]] if plain else "turn"
        lines = ["", f"{pad}def {name}({number}, carry):"]
        counted = [a for a in op.over if isinstance(a, str)]
        if counted and not op.unroll and op.end is None and (plain or len(counted) > 1):
            lines.append(f"{pad}    {number} = jnp.int32({number})")  # which JAX counts in 64 bits where it has those
        lines += [] if plain else self.turn(op, depth + 1)
        lines += [f"{pad}    {self.listed(op.carries)} = carry"] if op.carries else []
        lines += [*self.body(op.body, depth + 1), f"{pad}    return {self.tuple(op.yields)}", ""]
        outs = f"{self.listed(op.outs)} = " if op.outs else ""
        inits = f"({', '.join(map(self.initial, op.inits))}{',' * (len(op.inits) == 1)})"
        if op.unroll:  # a turn's number is traced, for the reason `scalar` gives
            begin = [f"{pad}carry = {inits}", f"{pad}for turn in range({self.program.turns(op.over[0])}):"]
            return [*lines, *begin, f"{pad}    carry = {name}({self.pid} * 0 + turn, carry)", f"{pad}{outs}carry"]
        return [*lines, *wrapped(f"{pad}{outs}lax.fori_loop(0, {self.turns(op)}, {name}, {inits})")]

    def turns(self, op: t.Loop) -> str:
        """How many turns a loop has."""
        over = op.over[0]
        axis = self.program.axis(over) if isinstance(over, str) else None
        if axis and (op.end is not None or axis.beside):
            end = self.typed(op.end, PLUS) if op.end is not None else str(axis.extent)
            left = f"{end} - ({self.begin(axis)[0]})" if axis.beside else end
            return self.word("div", f"{left} + {axis.step - 1}", axis.step) if axis.step > 1 else left
        return str(prod(map(self.program.turns, op.over)))

    def at_end(self, op: t.AtEnd, depth: int) -> list[str]:
        """What is done in the last turn, with what there is otherwise as its arguments: it may take their names."""
        pad, count = "    " * depth, self.program.turns(op.axis)
        kept = self.listed(op.otherwise).rstrip(",")
        lines = ["", f"{pad}def at_end({kept}):", *self.body(op.body, depth + 1)]
        ended = f"{WORDS['rem'].format('turn', count)} == {count - 1}"
        lines += [f"{pad}    return {', '.join(map(self.initial, op.yields))}", ""]
        return [*lines, *wrapped(f"{pad}{self.listed(op.outs)} = lax.cond({ended}, at_end, lambda *carried: carried, {kept})")]

    def listed(self, values: Iterable[t.Value]) -> str:
        """Values to be given names, or names as they are passed on; a comma after a single one."""
        found = [self.text(v) for v in values]
        return ", ".join(found) + "," * (len(found) == 1)

    def tuple(self, values: Iterable[t.Value]) -> str:
        """Values as one tuple."""
        return f"({self.listed(values)})"

    def initial(self, value: t.Value) -> str:
        """What a loop's carry begins as: a number is an array of its dtype."""
        if value not in self.literals:
            return self.text(value)
        return f"jnp.full((), {self.text(value)}, {DTYPES[value.dtype]})"

    def scalar(self, literal: str, dtype: str) -> str:
        """A literal that is traced: the GPU lowering has no rule for operations on literals alone. Of a float one times it, as

        nothing plus -0.0 is 0.0.
        """
        zero = f"{self.pid} * 0"
        if is_float(dtype):
            return f"(({zero} + 1).astype({DTYPES[dtype]}) * {literal})"
        return f"({zero} + {literal})" if dtype == "int32" else f"({zero} + {literal}).astype({DTYPES[dtype]})"

    def store(self, op: t.Store) -> str:
        axes = self.program.ordered(op.at.axes)
        written = self.program.param(op.at.tensor).viewed.buffer
        ref = f"{written}_out_ref" if written in buffers(self.program)[0] else f"{written}_ref"
        at = self.index(op.at, axes, self.chosen(op.at))
        return f"plt.store({ref}.at[{at}], {self.spread(op.value, axes)}{self.masked(op.at, axes)})"

    def chosen(self, at: t.Access) -> int | None:
        """The first dimension along which a masked block is stored at data, which may say the same of several lanes."""
        elements = {op.out for op, _ in t.walk(self.program.body) if isinstance(op, t.Elements)}
        data = (d for d, i in enumerate(at.index) if any(v.axes and v not in elements for v in i.values))
        return next(data, None) if at.mask else None

    def branches(self, op: t.Where) -> tuple[str, str]:
        """JAX 0.11's Triton lowering gives a literal beside a loop's number its own type, and two of them the condition's."""
        numbers = {op.yes, op.no} <= self.literals
        whole = not op.out.axes and (numbers or op.out.dtype not in ("bool", "float32", "float16", "bfloat16"))
        return (self.typed(op.yes, LOOSEST), self.typed(op.no, LOOSEST)) if whole else super().branches(op)

    def masked(self, at: t.Access, axes: tuple[str, ...]) -> str:
        """The mask of an access as a full block over `axes`."""
        mask = self.mask(at, axes)
        if mask and {a for m in at.mask for a in m.axes} != set(axes):
            mask = f"jnp.broadcast_to({mask}, {self.shape(axes)})"
        return f", mask={mask}" if mask else ""

    def index(self, at: t.Access, axes: tuple[str, ...], chosen: int | None = None) -> str:
        """One index per axis of the base array; past the end along dimension `chosen` in masked lanes, for JAX's interpret mode

        stores what it has read there.
        """
        layout = self.program.param(at.tensor).viewed
        texts = {axis: self.fixed(str(element), axes) for axis, element in layout.fixed}
        texts |= {axis: self.picked(n, axes) for axis, n in layout.picked}
        for index, axis, start, step in zip(at.index, layout.axes, layout.starts, layout.steps, strict=True):
            texts[axis] = self.element(at.tensor, index, axes, start, step)
        if chosen is not None:
            axis = layout.axes[chosen]
            texts[axis] = f"jnp.where({self.mask(at, axes)}, {texts[axis]}, {layout.base[axis]})"
        return ", ".join(texts[axis] for axis in range(len(layout.base))) or "..."

    def picked(self, name: str, axes: tuple[str, ...]) -> str:
        """An index that an operand holds."""
        return f"jnp.full({self.shape(axes)}, {name}, jnp.int32)" if axes else name

    def element(self, tensor: str, index: t.Index, axes: tuple[str, ...], start: int, step: int) -> str:
        """One index of an access as one along its base's axis, of which it is every `step`-th element from `start` on."""
        if told := self.starts.get((tensor, index)):
            first = told + (f" * {step}" if step != 1 else "") + (f" + {start}" if start else "")
        else:
            first = str(index.start * step + start)
        terms = []
        for value, own in index.terms:
            if (text := self.at(value, axes)) != "0":
                text = self.fixed(text, axes) if value in self.literals else text
                terms.append(f"{text} * {own * step}" if own * step != 1 else text)
        if not terms:
            return self.fixed(first, axes)
        return " + ".join([*terms, first] if first != "0" else terms)

    def fixed(self, at: str, axes: tuple[str, ...]) -> str:
        """A fixed index, traced: JAX 0.11's interpret mode refuses a literal beside a mask."""
        return f"jnp.full({self.shape(axes)}, {at}, jnp.int32)" if axes else f"{self.pid} * 0 + {at}"


def _load(p: PallasPrinter, op: t.Load) -> str:
    axes, mask = op.out.axes, p.masked(op.at, op.out.axes)
    ref = f"{p.program.param(op.at.tensor).viewed.buffer}_ref"
    fill = number(bool(op.fill) if op.out.dtype == "bool" else float(op.fill) if op.out.dtype in STORED else op.fill)
    return f"plt.load({ref}.at[{p.index(op.at, axes)}]{mask}{f', other={fill}' if mask else ''})"


def binary(p: PallasPrinter, op: t.Binary) -> str | Text:
    """An operation of two blocks."""
    if op.op not in ("maximum", "minimum", "floordiv", "rem"):
        return p.operator(op)
    a, b = p.pair(op)
    if op.op in ("maximum", "minimum"):
        return f"{p.helper(f'nan_{op.op}') if is_extreme(op) else f'jnp.{op.op}'}({a}, {b})"
    return f"{p.helper('trunc_div' if op.op == 'floordiv' else 'trunc_rem')}({a}, {b})"


def _reduce(p: PallasPrinter, op: t.Reduce) -> str:
    axis = op.value.axes.index(op.axis)
    if is_extreme(op):
        return f"{p.helper(f'nan_{op.op}')}({p.text(op.value)}, {axis})"
    dtype = f", dtype={DTYPES[op.out.dtype]}" if op.op == "sum" else ""
    return f"jnp.{op.op}({p.text(op.value)}, axis={axis}{dtype})"


def _dot(p: PallasPrinter, op: t.Dot) -> str | Text:
    m, n = op.out.axes
    left = p.text(op.left, ATOM) + (".T" if op.left.axes != (m, op.axis) else "")
    right = p.text(op.right, ATOM) + (".T" if op.right.axes != (op.axis, n) else "")
    product = f'jnp.dot({left}, {right}, precision="highest", preferred_element_type=jnp.float32)'
    return product if op.acc is None else (f"{p.text(op.acc, PLUS)} + {product}", PLUS)


def _halves(p: PallasPrinter, op: t.Halves) -> str:
    of = p.program.axis(op.axis).of
    named = [of if a == op.axis else a for a in op.value.axes]
    order = tuple(map(named.index, op.outs[0].axes))
    halves = _apart(p, op, op.value.axes.index(op.axis))
    return halves if order == tuple(range(len(order))) else f"(jnp.transpose(half, {order}) for half in {halves})"


def _apart(p: PallasPrinter, op: t.Halves, at: int) -> str:
    """Both halves of a block, of which strips come in turn or each is whole."""
    block, (n, strip) = p.program.block(op.value.axes), ((a := p.program.axis(op.axis)).block, a.strip)
    if n == 2 * strip:
        return f"jnp.split({p.text(op.value)}, 2, axis={at})"
    strips = f"{p.text(op.value, ATOM)}.reshape({(*block[:at], n // (2 * strip), 2 * strip, *block[at + 1 :])})"
    return f"(half.reshape({(*block[:at], n // 2, *block[at + 1 :])}) for half in jnp.split({strips}, 2, axis={at + 1}))"


def _interleave(p: PallasPrinter, op: t.Interleave) -> str:
    return woven([p.text(v) for v in op.values], f"{p.helper('interleave')}({{}}, {{}})")


def _ways(p: PallasPrinter, op: t.Ways) -> str:
    return f"{p.helper('ways')}({p.program.param(op.tensor).mailbox.buffer}_ref, {len(op.outs)})"


EXPRESSIONS: dict[type, Callable[[PallasPrinter, Any], str | Text]] = {
    **COMMON,
    **PACKETS,
    t.Halves: _halves,
    t.Deinterleave: lambda p, op: f"{p.helper('deinterleave')}({p.text(op.value)}, {len(op.outs)})",
    t.Interleave: _interleave,
    t.Load: _load,
    t.Binary: binary,
    t.Reduce: _reduce,
    t.Dot: _dot,
    t.Ways: _ways,
}


def emit(kernel: t.Kernel) -> str:
    """The source of one kernel: imports, helpers it needs, and a function of refs called `<name>_kernel`.

    The program's number is asked for once, at the top: JAX 0.11's interpret mode does not know it within loops in loops.
    """
    alone, shared = len(kernel.sections) == 1, helpers(kernel)
    printers = [PallasPrinter(h.section, EXPRESSIONS, "pid", h.starts) for h in shared]
    bodies = [[*_picked(p.program), *p.body(p.program.body, 1)] for p in printers]
    lines = [
        *header(kernel, __version__),
        *(["import jax"] if any("packets" in p.helpers for p in printers) else []),
        "import jax.numpy as jnp",
        "from jax import lax",
        "from jax.experimental import pallas as pl",
        "from jax.experimental.pallas import triton as plt",
        "",
    ]
    for name in sorted({h for p in printers for h in p.helpers}):
        lines += ["", HELPERS[name]]
    for helper, body in zip(shared, bodies, strict=True) if not alone else ():
        takes = ["pid", *_refs(helper.section), *helper.starts.values()]
        lines += ["", f"def {helper.section.name}({', '.join(takes)}):", *body, ""]
    lines += ["", f"def {kernel_name(kernel)}({', '.join(_refs(kernel))}):"]
    lines += ["    pid = pl.program_id(0)"] if not alone or re.search(r"\bpid\b", "\n".join(bodies[0])) else []
    return "\n".join([*lines, *(bodies[0] if alone else sections(kernel, shared, PallasPrinter, _refs)), ""])


def _picked(section: t.TileProgram) -> list[str]:
    """What says at run time where some operands lie, each loaded once."""
    names = dict.fromkeys(name for p in section.params if not isinstance(p.layout, t.Mailbox) for _, name in p.viewed.picked)
    return [f"    {name} = plt.load({name}_ref.at[pid * 0])" for name in names]


def _refs(kernel: t.Kernel) -> list[str]:
    """What a kernel calls its buffers: those it reads, then those it writes."""
    read, written = buffers(kernel)
    return [f"{b}_ref" for b in read] + [f"{b}_out_ref" if b in read else f"{b}_ref" for b in written]


def sections(kernel: t.Kernel, shared: tuple[Helper, ...], printer: type[PallasPrinter], refs: Callable) -> list[str]:
    """Which programs of a launch belong to which section; all sizes are static. `refs`: what a section takes."""
    lines = []
    for call in calls(kernel, shared, printer):
        passed = [call.own, *refs(call.section), *map(str, call.starts)]
        lines += [*call.before, "", f"    @pl.when({call.inside})", "    def _():"]
        lines.append(f"        {call.helper}({', '.join(passed)})")
    return lines
