"""Names in emitted text: the declaration's own where it has them, never a word of the languages printed; and what gets one.

A value that the declaration does not name and that is read once, in the run of operations it is made in, is written where it is
read. What a loop carries has one name from its first value to its last.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from moekit.compile import tile as t
from moekit.lang.elementwise import ELEMENTWISE

RESERVED = {
    *keyword.kwlist,
    *dir(builtins),
    *("tl", "triton", "pl", "plt", "jnp", "lax", "jax", "program", "self", "turn", "carry", "pid", "PDL"),
    *("gdc_launch_dependents", "gdc_wait", "prefetch", "trunc_div", "trunc_rem", "at_end", "barrier"),
    *("ways", "packets", "elementwise", "deinterleave", "interleave", "split_4", "send_1", "send_2"),
    *(f"receive_{words}x{n}" for words in (1, 2) for n in (1, 2, 4)),
    *(f"nan_{kind}" for kind in ("max", "min", "maximum", "minimum")),
    *("plgpu", "mgpu", "np", "math", "contextlib", "ir", "arith", "vector", "load", "store", "lanes", "spread", "tiled"),
    *("element", "places", "given", "laid", "mma", "mma_steps", "spread_to"),
}
ARGUMENT = re.compile(r"^n_|^end_|_ptr$|_ref$|_stride_|_body$|_LAYOUT$")  # as other things in a kernel are called
PURE = (t.Cast, t.Bitcast, t.Unary, t.Binary, t.Where, t.InBounds)
LARGEST = 5  # operations in one expression that is written where it is read
REDUCTIONS = {"sum": "total", "max": "largest", "min": "smallest"}


def identifier(axis: str) -> str:
    """A Python identifier for an axis: `2*I` → `i2x`, `H` → `h`."""
    text = re.sub(r"(\d+)\*(\w+)", r"\2\1x", axis).replace("+", "_").replace(".", "_").lower()
    return text if text.isidentifier() else f"n{re.sub(r'[^0-9a-z_]', '_', text)}"


def extent_name(axis: str) -> str:
    """The kernel argument that carries the size of a dynamic axis: the axis's name, unless something else is called so."""
    plain = axis.isidentifier() and axis not in RESERVED and not ARGUMENT.search(axis)
    return axis if plain else f"n_{identifier(axis)}"


def arguments_of(axes: Iterable[str], tensors: Mapping[str, Sequence[str | None]]) -> set[str]:
    """Every name that a kernel over these axes, on tensors with these axes, may give to an argument."""
    pointers = {f"{t}{end}" for t in tensors for end in ("_ptr", "_ref", "_out_ref")}
    strides = {f"{t}_stride_{identifier(a)}" for t, dims in tensors.items() for a in dims if a is not None}
    return {extent_name(a) for a in axes} | pointers | strides | {f"{s}_by{n}" for s in strides for n in (2, 4, 8, 16)}


@dataclass
class Names:
    """What each value of a program is called in text, and which values are written where they are read (`inline`).

    Values in `same` share the name of another one: of a loop's carry its results, and its yields where nothing reads the carry
    any more.
    """

    program: t.TileProgram
    of: dict[t.Value, str] = field(default_factory=dict)
    inline: set[t.Value] = field(default_factory=set)
    same: dict[t.Value, t.Value] = field(default_factory=dict)

    def __getitem__(self, value: t.Value) -> str:
        return self.of[self.owner(value)]

    def owner(self, value: t.Value) -> t.Value:
        """The value whose name this one has."""
        while value in self.same:
            value = self.same[value]
        return value


def names(program: t.TileProgram) -> Names:
    """The names of a program's values, each for one thing at a time."""
    found = Names(program)
    _choose_inline(found, program.body, _uses(program.body))
    _share(found, program.body)
    taken = RESERVED | arguments_of([a.name for a in program.axes], {p.name: p.axes for p in program.params})
    named = [op for op, _ in t.walk(program.body) if not isinstance(op, t.Elements | t.InBounds)]
    given = {v.name for op in named for v in t.results(op) if v.name}
    _assign(found, program.body, taken, given)
    return found


def _uses(ops: Iterable[t.Op]) -> Counter[t.Value]:
    """How often each value is read."""
    return Counter(v for op, _ in t.walk(ops) for v in t.reads(op))


def _choose_inline(found: Names, ops: Sequence[t.Op], uses: Counter[t.Value]) -> None:
    """Note what of a run of operations, and of those within, is written where it is read: not beyond a product."""
    here = Counter(v for op in ops for v in t.operands(op))
    products = list(accumulate((isinstance(op, t.Dot) for op in ops), initial=0))  # before each operation
    read = {v: products[i] for i, op in enumerate(ops) for v in t.operands(op)}
    size: dict[t.Value, int] = {}
    inits = {v for op in ops if isinstance(op, t.Loop) for v in op.inits}
    for i, op in enumerate(ops):
        if isinstance(op, t.Loop | t.AtEnd):
            _choose_inline(found, op.body, uses)
            continue
        for out in t.results(op):
            size[out] = 1 + sum(size.get(v, 0) for v in t.operands(op) if v in found.inline)
            near = read.get(out, 0) == products[i]
            once = near and uses[out] == here[out] == 1 and (not out.name or out in inits) and size[out] <= LARGEST
            number = isinstance(op, t.Const) and (bool(out.axes) or not out.name)
            if number or isinstance(op, t.Along | t.Extent | t.Sides) or (isinstance(op, PURE) and once):
                found.inline.add(out)
    for op in ops:
        if isinstance(op, t.Elements) and op.turn and not op.part and not op.out.axes:
            found.same[op.out] = op.turn


def _reads(found: Names, op: t.Op, made: Mapping[t.Value, tuple[int, t.Op]]) -> Iterator[t.Value]:
    """The named values that the text of an operation reads, those in expressions within it among them."""
    left = [v for o, _ in t.walk([op]) for v in t.reads(o)]
    while left:
        value = left.pop()
        if value in found.inline and value in made:
            left += t.operands(made[value][1])
        else:
            yield value


def _share(found: Names, ops: Sequence[t.Op], kept: tuple[t.Value, ...] = ()) -> None:
    """Give what a loop carries one name, in this run of operations and those within; `kept` are read after it."""
    for op in ops:
        if isinstance(op, t.AtEnd):
            found.same |= dict(zip(op.outs, op.otherwise, strict=True))  # nothing stands after it
            _rename(found, op.body, op.otherwise, op.yields)
        if isinstance(op, t.Loop):
            _share(found, op.body, op.yields)
            found.same |= dict(zip(op.outs, op.carries, strict=True))
            _rename(found, op.body, op.carries, op.yields)
    _reassign(found, ops, kept)


def _reassign(found: Names, ops: Sequence[t.Op], kept: tuple[t.Value, ...]) -> None:
    """Let what takes the place of a value that is called the same take its name: `series = (series + x) * y`."""
    before: dict[tuple, t.Value] = {}
    for op in (op for op in ops if isinstance(op, PURE) and op.out.name and op.out not in {*kept, *found.same}):
        said = (op.out.name, op.out.dtype, op.out.axes)
        if said in before:
            _rename(found, ops, (before[said],), (op.out,))
        before[said] = op.out


def _rename(found: Names, ops: Sequence[t.Op], before: tuple[t.Value, ...], after: tuple[t.Value, ...]) -> None:
    """Let what `ops` make take the name of what it takes the place of, where nothing reads that any more."""
    made = {v: (i, op) for i, op in enumerate(ops) for v in t.results(op)}
    last: dict[t.Value, int] = {}
    for i, op in enumerate(ops):
        if not (t.results(op) and set(t.results(op)) <= found.inline):
            last |= {found.owner(v): i for v in _reads(found, op, made)}
    for old, new in zip(map(found.owner, before), map(found.owner, after), strict=True):
        place, op = made.get(new, (-1, None))
        free = op is not None and new not in found.inline and not isinstance(op, t.Loop)
        if free and after.count(new) < 2 and old not in after and last.get(old, -1) <= place:
            found.same[new] = old


def _assign(found: Names, ops: Sequence[t.Op], taken: set[str], given: set[str], turns: tuple[t.Value, ...] = ()) -> None:
    """Name what a run of operations makes, then what those within make: two loops side by side may use the same names."""
    taken, made = set(taken), {v: op for op in ops for v in t.results(op)}
    mine: list[tuple[t.Value, str, bool]] = [(v, v.name, True) for v in turns]
    for op in ops:
        derived = isinstance(op, t.Elements | t.InBounds)
        if isinstance(op, t.Loop):
            mine += [(v, v.name, False) for v in op.carries]
        mine += [(v, v.name or _noun(op), derived or not v.name) for v in t.results(op)]
    for value, name, derived in sorted(mine, key=lambda each: each[2]):
        if value in found.inline or value in found.of or value in found.same:
            continue
        name = name if name.isidentifier() and not ARGUMENT.search(name) else "value"
        if isinstance(made.get(value), t.Elements) and name in given:
            name = f"{name}_index"
        number, chosen = 0, name
        while chosen in taken or (derived and chosen in given):
            number += 1
            chosen = f"{name}_{number}"
        taken.add(chosen)
        found.of[value] = chosen
    for op in ops:
        if isinstance(op, t.Loop | t.AtEnd):
            _assign(found, op.body, taken, given, op.vars if isinstance(op, t.Loop) else ())


def _noun(op: t.Op) -> str:
    """What a value is called that the declaration does not name."""
    if isinstance(op, t.Cast | t.Bitcast):
        short = re.sub(r"[a-z]+", lambda m: {"bfloat": "bf", "float": "f", "int": "i"}.get(m[0], m[0]), op.out.dtype)
        of = op.value.name or "value"
        return f"{of}_{short}" if isinstance(op, t.Cast) else f"{of}_bits"
    if isinstance(op, t.Unary | t.Binary):
        return ELEMENTWISE[op.op].noun
    return REDUCTIONS[op.op] if isinstance(op, t.Reduce | t.Accumulate) else "selected" if isinstance(op, t.Where) else "value"
