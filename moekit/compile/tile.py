"""The tile IR: what one program of a kernel does to blocks. Frozen dataclasses, no framework in sight.

A `Value` is a block (tile): one dimension per axis it varies over whose block is larger than 1, in the program's axis
order; a value with no axes is a scalar. Operands of one operation are aligned by axis name, as numpy aligns by position.
Every value is defined once. `verify.py` holds the rules, `interpret.py` is the meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
        """How many turns it takes; TypeError if only a call says so."""
        if not isinstance(self.stop, int):
            raise TypeError(f"the loop over {self.var.name} ends at {self.stop.name}, which a call says")
        return -(-self.stop // self.step)


Op = (
    Const | ProgramId | Extent | Index | Sides | Half | InBounds | Load | Store | Prefetch | Cast | Bitcast | Unary | Binary
    | Where | Full | Reduce | Scan | Dot | Loop
)  # fmt: skip


@dataclass(frozen=True)
class AxisBlock:
    """How a program holds an axis: `grid` (one block per program), `whole` (one block is all of it), `loop`.

    `extent` None is dynamic. `parts` > 1: a looped axis of which each program of the grid axis `<name>.part` does a share.
    `of`: this block is one of that axis twice, side by side.
    """

    name: str
    extent: int | None
    block: int
    mode: str
    parts: int = 1
    of: str | None = None

    @property
    def partial(self) -> bool:
        """Whether some block reaches past the end of the axis."""
        if self.mode == "whole":
            return self.extent != self.block
        if self.block * self.parts == 1:
            return False
        return self.extent is None or self.extent % (self.block * self.parts) != 0

    @property
    def share(self) -> int:
        """Elements of the axis that one part covers, a multiple of the block (static axes only)."""
        blocks = -(-(self.extent or 0) // self.block)
        return -(-blocks // self.parts) * self.block


@dataclass(frozen=True)
class Strided:
    """A tensor reached through a pointer and run-time strides: per dimension `unit` (1), `aligned` (a multiple of
    16 bytes) or `any`; `wide` where static extents × strides may pass 2³¹ - 1."""

    strides: tuple[str, ...]
    wide: bool = False


@dataclass(frozen=True)
class Viewed:
    """A tensor that is part of a dense array: operand `buffer` of shape `base`, dimension d being elements
    `start + step·i` of base axis `axes[d]`; base axes in no dimension stay at their `fixed` element."""

    buffer: str
    base: tuple[int, ...]
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Param:
    """A tensor of a program. `axes`: the axis of each dimension (None: a dimension of size 1)."""

    name: str
    role: str
    dtype: str
    axes: tuple[str | None, ...]
    layout: Strided | Viewed

    @property
    def strided(self) -> Strided:
        """The layout of a tensor behind a pointer; TypeError if it is part of an array."""
        if not isinstance(self.layout, Strided):
            raise TypeError(f"{self.name} is {self.layout}, which has no strides")
        return self.layout

    @property
    def viewed(self) -> Viewed:
        """The layout of a tensor that is part of an array; TypeError if it is behind a pointer."""
        if not isinstance(self.layout, Viewed):
            raise TypeError(f"{self.name} is {self.layout}, which is part of no array")
        return self.layout


@dataclass(frozen=True)
class TileProgram:
    """One kernel. `grid`: the axes its programs are numbered by, outermost first, all on one launch dimension."""

    name: str
    params: tuple[Param, ...]
    axes: tuple[AxisBlock, ...]
    grid: tuple[str, ...]
    body: tuple[Op, ...]
    warps: int
    stages: int
    digest: str = ""
    comments: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def sections(self) -> tuple[TileProgram, ...]:
        """The program alone: what a `Joined` has several of."""
        return (self,)

    def axis(self, name: str) -> AxisBlock:
        """The block of axis `name`."""
        return next(a for a in self.axes if a.name == name)

    def param(self, name: str) -> Param:
        """The tensor `name`."""
        return next(p for p in self.params if p.name == name)

    def block(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of a block over `axes`."""
        return tuple(self.axis(a).block for a in axes)

    def programs(self, sizes: dict[str, int]) -> int:
        """How many programs a launch has; `sizes` gives the dynamic extents."""
        count = 1
        for name in self.grid:
            a = self.axis(name)
            extent = sizes[name] if a.extent is None else a.extent
            count *= -(-extent // a.block)
        return count

    def __str__(self) -> str:
        lines = [f"program {self.name}(" + ", ".join(p.name for p in self.params) + f")  # {self.digest}"]
        for p in self.params:
            lines.append(f"  {p.role.lower()} {p.name}: {p.dtype}[{', '.join(str(a) for a in p.axes)}] {p.layout}")
        for a in self.axes:
            extent = "dynamic" if a.extent is None else a.extent
            lines.append(f"  axis {a.name}: {extent} in {a.mode} blocks of {a.block}" + (f", {a.parts} parts" * (a.parts > 1)))
        lines.append(f"  grid ({', '.join(self.grid)}), {self.warps} warps, {self.stages} stages")
        return "\n".join(lines + text_of(self.body, 1))


@dataclass(frozen=True)
class Joined:
    """One kernel that is several programs side by side: the first programs of its grid are those of the first section.

    Sections `abreast` have the same blocks along their outermost axis and take turns, block by block of it: what all of them
    read there is read by all while it is at hand.
    """

    name: str
    sections: tuple[TileProgram, ...]
    warps: int
    stages: int
    digest: str = ""
    abreast: bool = False

    @property
    def params(self) -> tuple[Param, ...]:
        """The tensors of all sections, each once; one that some section writes has that section's role."""
        found: dict[str, Param] = {}
        for p in (p for s in self.sections for p in s.params):
            if p.name not in found or p.role != "In":
                found[p.name] = p
        return tuple(found.values())

    @property
    def axes(self) -> tuple[AxisBlock, ...]:
        """Every section's blocks; an axis may be held in several ways."""
        return tuple(a for s in self.sections for a in s.axes)

    def param(self, name: str) -> Param:
        """The tensor `name`."""
        return next(p for p in self.params if p.name == name)

    def programs(self, sizes: dict[str, int]) -> int:
        """How many programs a launch has."""
        return sum(s.programs(sizes) for s in self.sections)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.sections))


Kernel = TileProgram | Joined


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
