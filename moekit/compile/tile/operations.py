"""The operations of the tile IR: what one program of a kernel does to blocks.

A `Value` is a block (tile): one dimension per axis it varies over whose block is larger than 1, in the program's axis
order; a value with no axes is a scalar. Operands of one operation are aligned by axis name, as numpy aligns by position.
Every value is defined once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moekit.lang.graph import Index

LINE = 128  # bytes of memory that come at once


@dataclass(frozen=True)
class Value:
    """A block: its number, dtype and axes. `name` (what the declaration calls it, "" for nothing) and `line` (where it comes
    from) are for readers and take no part in comparisons."""

    number: int
    dtype: str
    axes: tuple[str, ...] = ()
    name: str = field(default="", compare=False)
    line: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return self.number

    def __str__(self) -> str:
        return f"{self.label}: {self.dtype}[{', '.join(self.axes)}]"

    @property
    def label(self) -> str:
        """How a program's text calls it."""
        return f"%{self.number}" + (f":{self.name}" if self.name else "")


@dataclass(frozen=True)
class Access:
    """Elements of `tensor`, one index per dimension. Step 0 of a term keeps the block's shape.

    Two things are derived from it by a pass (`passes/masks.py`): `mask`, bools that must all hold for memory to be touched, and
    `wide`, per dimension whether index × stride is computed in 64 bits.
    """

    tensor: str
    index: tuple[Index[Value], ...]
    mask: tuple[Value, ...] = ()
    wide: tuple[bool, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """The axes of the block of addresses."""
        return frozenset(a for i in self.index for v in i.values for a in v.axes)


@dataclass(frozen=True)
class Const:
    """A number, or a block filled with it."""

    out: Value
    value: bool | int | float


@dataclass(frozen=True)
class Extent:
    """The run-time size of a dynamic axis, int32."""

    out: Value
    axis: str


@dataclass(frozen=True)
class Elements:
    """The elements of `axis` that this block holds, int32: of a grid axis the program's block, of a whole one all.

    Of a looped axis from `turn` on, the variable of the loop around; where programs or an outer loop do a share of it each,
    that of part number `part`. Along an axis that is another one twice they stand there twice, one after the other.
    """

    out: Value
    axis: str
    turn: Value | None = None
    part: Value | None = None


@dataclass(frozen=True)
class Sides:
    """0 for the first half of a block of `axis`, which is another one twice, and `apart` for the second, int32."""

    out: Value
    axis: str
    apart: int


@dataclass(frozen=True)
class InBounds:
    """Where `value` is an element of `axis`: the mask that the axis owns. `signed`: it is data, and may be negative."""

    out: Value
    value: Value
    axis: str
    signed: bool = False


@dataclass(frozen=True)
class Load:
    """Elements of a tensor; `fill` where they are masked."""

    out: Value
    at: Access
    fill: float = 0


@dataclass(frozen=True)
class Store:
    """Write `value`, which has the tensor's dtype."""

    at: Access
    value: Value


@dataclass(frozen=True)
class Prefetch:
    """Ask for the memory of `size` elements along dimension `along`, which lie side by side, from the index on.

    A hint: nothing is read, so a program may give it while what it depends on is still being written. `size` is a power of two
    of memory lines (`LINE` bytes).
    """

    at: Access
    along: int
    size: int


@dataclass(frozen=True)
class AllReduce:
    """Σ over `ranks` ranks of each one's `value`, in float32 and in their order; a pass makes packets of it.

    `at` has the elements of the value in the mailbox of mesh axis `axis`.
    """

    out: Value
    value: Value
    at: Access
    axis: str
    ranks: int


@dataclass(frozen=True)
class Ways:
    """What the mailboxes of `tensor` are reached by, int64: each rank's for what this one sends, its own for what each sends (0
    to and from itself, to whom it sends nothing), its word of errors; and how many times a wait looks."""

    outs: tuple[Value, ...]
    tensor: str


@dataclass(frozen=True)
class Send:
    """Put `values` into the mailbox of rank `peer`, by `way`: a packet for each element of each, its data and number `epoch` at
    once. Those of one element of all values lie side by side. Nothing is sent where `way` says that the peer is this rank.

    `out` is the first value again: what reads it comes after.
    """

    out: Value
    values: tuple[Value, ...]
    epoch: Value
    at: Access
    way: Value
    peer: int

    @property
    def words(self) -> int:
        """How many packets an access has."""
        return len(self.values)


@dataclass(frozen=True)
class Receive:
    """Wait until the packets from rank `sender` have the number `epoch`, and take the data, as many values as
    were sent: `own`, which stay as they are where packets are masked, and where `way` says that the sender is this rank.

    A wait comes after what `own` is made of. One that has looked `most` times notes `errors`, and takes what there is.
    """

    outs: tuple[Value, ...]
    own: tuple[Value, ...]
    epoch: Value
    at: Access
    way: Value
    errors: Value
    most: Value
    sender: int

    @property
    def words(self) -> int:
        """How many packets an access has."""
        return len(self.outs)


@dataclass(frozen=True)
class Barrier:
    """What any lane has loaded before is loaded before any lane stores what comes after."""


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
class Along:
    """The same block along other axes, which are held in the same blocks: what is multiplied along either is loaded once."""

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
class Reduce:
    """Reduce the block along `axis` by sum, max or min; max and min give NaN if any element is NaN."""

    out: Value
    op: str
    value: Value
    axis: str


@dataclass(frozen=True)
class Accumulate:
    """One turn of a reduction over the looped `axis`: `acc` and `value` combined, lane by lane."""

    out: Value
    op: str
    acc: Value
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
class Halves:
    """The two halves of a block along `axis`, which is another one twice, each as a block along that one."""

    outs: tuple[Value, Value]
    value: Value
    axis: str


@dataclass(frozen=True)
class Deinterleave:
    """Neighbours along `axis`, the last one of the block, in a block each along `into`, which has one element for all of them:
    the k-th of n outs has the elements k, n + k, 2n + k, …"""

    outs: tuple[Value, ...]
    value: Value
    axis: str
    into: str


@dataclass(frozen=True)
class Interleave:
    """The reverse: along `axis` an element of each of `values` in turn, which have `by` in its place."""

    out: Value
    values: tuple[Value, ...]
    axis: str
    by: str


@dataclass(frozen=True)
class TopK:
    """The `k` largest int32 `keys` along `axis` and their indices, best first along axis `into`, ties to the lower index.

    `packed`: a key's low 16 bits are 0, so that its index fits there. `elements` are those of `axis`, `ranks` those of `into`.
    """

    outs: tuple[Value, Value]
    keys: Value
    elements: Value
    ranks: Value
    axis: str
    k: int
    packed: bool


@dataclass(frozen=True)
class Loop:
    """Run `body` once for each block of the axes `over`, the last one's turns following each other; or a number of times.

    `vars` has for each of `over` the element at which the turn begins (its number, of a number of times). Each carry begins as
    its init and takes the value of its yield; `outs` are the last ones. `unroll`: the turns are written out, so that all their
    loads are in flight at once, which changes no result. `end`, an int32: turns that begin there or later are left out.
    """

    vars: tuple[Value, ...]
    over: tuple[str | int, ...]
    carries: tuple[Value, ...]
    inits: tuple[Value, ...]
    body: tuple[Op, ...]
    yields: tuple[Value, ...]
    outs: tuple[Value, ...]
    unroll: bool = False
    end: Value | None = None


@dataclass(frozen=True)
class AtEnd:
    """In the last turn over `axis` of the loop around: run `body`, and `outs` are its `yields`; else they are `otherwise`."""

    axis: str
    body: tuple[Op, ...]
    yields: tuple[Value, ...]
    otherwise: tuple[Value, ...]
    outs: tuple[Value, ...]


Op = (
    Const | Extent | Elements | Sides | InBounds | Load | Store | Prefetch | Barrier | Cast | Bitcast | Unary | Binary | Where
    | Reduce | Accumulate | Scan | Dot | Halves | Deinterleave | Interleave | TopK | Loop | AtEnd | AllReduce | Ways | Send
    | Receive | Along
)  # fmt: skip
Packet = Send | Receive
Memory = Load | Store | Prefetch | AllReduce | Packet
