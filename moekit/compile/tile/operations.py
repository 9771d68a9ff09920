"""The operations of the tile IR: what one program of a kernel does to blocks.

A `Value` is a block (tile): one dimension per axis it varies over whose block is larger than 1, in the program's axis
order; a value with no axes is a scalar. Operands of one operation are aligned by axis name, as numpy aligns by position.
Every value is defined once.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE = 128  # bytes of memory that come at once


@dataclass(frozen=True)
class Value:
    """A block: its name in the emitted text, dtype and axes."""

    name: str
    dtype: str
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Const:
    """A number."""

    out: Value
    value: bool | int | float


@dataclass(frozen=True)
class ProgramId:
    """Which block of grid axis `axis` this program works on, int32."""

    out: Value
    axis: str


@dataclass(frozen=True)
class Extent:
    """The run-time size of a dynamic axis, int32."""

    out: Value
    axis: str


@dataclass(frozen=True)
class Index:
    """`start` + 0, 1, … block-1 along `axis`, int32: the elements of the axis that this block holds.

    Along an axis that is `axis` twice (`AxisBlock.of`) they stand there twice, one after the other.
    """

    out: Value
    axis: str
    start: Value | None


@dataclass(frozen=True)
class Sides:
    """Along `axis`, which is another one twice: `values[0]` in the first half, `values[1]` in the second, int32."""

    out: Value
    axis: str
    values: tuple[int, int]


@dataclass(frozen=True)
class Half:
    """The first (`side` 0) or second half of a block along `axis`, which is another one twice, as a block along that one."""

    out: Value
    value: Value
    axis: str
    side: int


@dataclass(frozen=True)
class InBounds:
    """Where `index` is an element of `axis`: the mask that the axis owns."""

    out: Value
    axis: str
    index: Value


@dataclass(frozen=True)
class Load:
    """Elements of `tensor` at `index` (one value per dimension, None for element 0); `fill` where `mask` is false.

    `wide` says per dimension whether index × stride is computed in 64 bits.
    """

    out: Value
    tensor: str
    index: tuple[Value | None, ...]
    wide: tuple[bool, ...]
    mask: Value | None
    fill: float = 0


@dataclass(frozen=True)
class Store:
    """Write `value`, cast to nothing, to `tensor` at `index` where `mask` holds."""

    tensor: str
    index: tuple[Value | None, ...]
    wide: tuple[bool, ...]
    value: Value
    mask: Value | None


@dataclass(frozen=True)
class Prefetch:
    """Ask for the memory of `size` elements of `tensor` along dimension `along`, which lie side by side, from `index` on.

    A hint: nothing is read, so a program may give it while what it depends on is still being written. `size` is a power of two
    of memory lines (`LINE` bytes).
    """

    tensor: str
    index: tuple[Value | None, ...]
    wide: tuple[bool, ...]
    mask: Value | None
    along: int
    size: int


@dataclass(frozen=True)
class Cast:
    """Convert to `out.dtype`, rounding to nearest even where it narrows."""

    out: Value
    value: Value


@dataclass(frozen=True)
class Bitcast:
    """The same bits as `out.dtype`."""

    out: Value
    value: Value


@dataclass(frozen=True)
class Unary:
    """An element-wise function of one block (graph.UNARY)."""

    out: Value
    op: str
    value: Value


@dataclass(frozen=True)
class Binary:
    """An element-wise function of two blocks (graph.BINARY)."""

    out: Value
    op: str
    left: Value
    right: Value


@dataclass(frozen=True)
class Where:
    """`yes` where `condition` holds, else `no`."""

    out: Value
    condition: Value
    yes: Value
    no: Value


@dataclass(frozen=True)
class Full:
    """A block filled with one number: how an accumulator begins."""

    out: Value
    value: bool | int | float


@dataclass(frozen=True)
class Reduce:
    """Reduce the block along `axis` by sum, max or min; max and min give NaN if any element is NaN."""

    out: Value
    op: str
    value: Value
    axis: str


@dataclass(frozen=True)
class Scan:
    """Inclusive running sum of the block along `axis`."""

    out: Value
    value: Value
    axis: str


@dataclass(frozen=True)
class Dot:
    """out[m, n] = acc[m, n] + Σ_axis left·right, products and sums in float32 (float32 operands unrounded)."""

    out: Value
    left: Value
    right: Value
    axis: str
    acc: Value | None


@dataclass(frozen=True)
class Loop:
    """For `var` = 0, step, 2·step, … < stop: run `body`, then each `carry` takes the value of its `yields`.

    After the loop `outs` are the last carries; `stop` is a number, or the value of a dynamic extent. `unroll`: the turns are
    written out, so that all their loads are in flight at once. `flat`: the turns of the one loop in `body` follow each other
    from turn to turn of this one without a gap, so that loads stay in flight between them. Neither changes a result.
    """

    var: Value
    stop: Value | int
    step: int
    carries: tuple[Value, ...]
    inits: tuple[Value, ...]
    body: tuple[Op, ...]
    yields: tuple[Value, ...]
    outs: tuple[Value, ...]
    unroll: bool = False
    flat: bool = False

    @property
    def turns(self) -> int:
        """How many turns a loop of static size has; TypeError if that is not known."""
        if isinstance(self.stop, Value):
            raise TypeError(f"the loop over {self.var} runs to {self.stop}, which only a launch knows")
        return -(-self.stop // self.step)


Op = (
    Const | ProgramId | Extent | Index | Sides | Half | InBounds | Load | Store | Prefetch | Cast | Bitcast | Unary | Binary
    | Where | Full | Reduce | Scan | Dot | Loop
)  # fmt: skip


def result(op: Op) -> Value | None:
    """The one value an operation defines (None for a store, a prefetch and a loop)."""
    return None if isinstance(op, Store | Prefetch | Loop) else op.out


def operands(op: Op) -> tuple[Value, ...]:
    """The values an operation reads (a loop: its inits; its body reads are its own)."""
    if isinstance(op, Loop):
        stop = (op.stop,) if isinstance(op.stop, Value) else ()
        return (*stop, *op.inits)
    found = []
    for name in op.__dataclass_fields__:
        value = getattr(op, name)
        if name == "out":
            continue
        if isinstance(value, Value):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(v for v in value if isinstance(v, Value))
    return tuple(found)


def text_of(body: tuple[Op, ...], depth: int) -> list[str]:
    """The program text of `moekit show --as tile`."""
    lines, pad = [], "  " * depth
    for op in body:
        if isinstance(op, Loop):
            stop = op.stop.name if isinstance(op.stop, Value) else op.stop
            carried = ", ".join(f"{c} = {i.name}" for c, i in zip(op.carries, op.inits, strict=False))
            how = " unrolled" * op.unroll + " flat" * op.flat
            lines.append(f"{pad}loop {op.var.name} in 0..{stop} step {op.step} ({carried}){how}")
            lines += text_of(op.body, depth + 1)
            lines.append(f"{pad}  yield {', '.join(v.name for v in op.yields)} -> {', '.join(v.name for v in op.outs)}")
            continue
        fields = []
        for name in op.__dataclass_fields__:
            value = getattr(op, name)
            if name != "out" and value is not None:
                fields.append(f"{name}={_short(value)}")
        made = result(op)
        left = f"{made} = " if made else ""
        lines.append(f"{pad}{left}{type(op).__name__}({', '.join(fields)})")
    return lines


def _short(value) -> str:
    if isinstance(value, Value):
        return value.name
    if isinstance(value, tuple):
        return "(" + ", ".join("-" if v is None else _short(v) for v in value) + ")"
    return str(value)
