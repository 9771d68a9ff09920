"""The programs of the tile IR: how blocks cover axes, where tensors lie, and the kernels made of both and of operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile.tile.operations import Op
from moekit.compile.tile.text import text_of


@dataclass(frozen=True)
class AxisBlock:
    """How a program holds an axis: `grid` (one block per program), `whole` (one block is all of it), `loop`, or `gather` (no
    block: data say which elements).

    `extent` None is dynamic. `parts` > 1: a looped axis in so many shares, one for each element of the axis `<name>.part`,
    of `each` elements where a number is said, which is a multiple of the block. `of`: this block is one of that axis
    twice, `strip` elements of either in turn. `beside` > 0: a looped axis of which so many programs, numbered along it, take
    blocks in turn.
    """

    name: str
    extent: int | None
    block: int
    mode: str
    parts: int = 1
    of: str | None = None
    each: int = 0
    beside: int = 0
    strip: int = 0

    @property
    def partial(self) -> bool:
        """Whether some block reaches past the end of the axis."""
        if self.mode == "whole":
            return self.extent != self.block
        if self.block * self.parts == 1:
            return False
        return self.extent is None or self.extent % (self.block if self.each else self.block * self.parts) != 0

    @property
    def blocks(self) -> int:
        """How many blocks the axis has (static axes only)."""
        return -(-(self.extent or 0) // self.block)

    @property
    def numbered(self) -> bool:
        """Whether programs are numbered along the axis."""
        return self.mode == "grid" or self.beside > 0

    @property
    def step(self) -> int:
        """Elements from one turn of a loop over the axis to the next."""
        return self.block * max(1, self.beside)

    @property
    def share(self) -> int:
        """Elements of the axis that one part covers, a multiple of the block (static axes only)."""
        return self.each or -(-self.blocks // self.parts) * self.block

    @property
    def length(self) -> int | None:
        """How many elements a loop over the axis covers; None if only a launch knows."""
        return self.share if self.parts > 1 else self.extent


@dataclass(frozen=True)
class Strided:
    """A tensor reached through a pointer and run-time strides: per dimension `unit` (1), `aligned` (a multiple of
    16 bytes) or `any`; `wide` where static extents × strides may pass 2³¹ - 1."""

    strides: tuple[str, ...]
    wide: bool = False


@dataclass(frozen=True)
class Viewed:
    """A tensor that is part of a dense array: operand `buffer` of shape `base`, dimension d being elements
    `start + step·i` of base axis `axes[d]`; base axes in no dimension stay at their `fixed` element, or at the one that operand
    `picked` holds, an int32 array of one element which is in range."""

    buffer: str
    base: tuple[int, ...]
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...] = ()
    picked: tuple[tuple[int, str], ...] = ()

    @classmethod
    def whole(cls, buffer: str, shape: tuple[int, ...]) -> Viewed:
        """All of an array of its own."""
        n = len(shape)
        return cls(buffer, shape, tuple(range(n)), (0,) * n, (1,) * n)


@dataclass(frozen=True)
class Mailbox:
    """Where every rank's packets for this one arrive: for each rank, row and slot `pitch(width)` packets, of which a row of the
    tensor, of its dtype, takes the first. Reached through the addresses that `buffer` holds."""

    buffer: str
    ranks: int
    width: int


Layout = Strided | Viewed | Mailbox


@dataclass(frozen=True)
class Param:
    """A tensor of a program. `axes`: the axis of each dimension (None: a dimension of size 1)."""

    name: str
    role: str
    dtype: str
    axes: tuple[str | None, ...]
    layout: Layout

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

    @property
    def mailbox(self) -> Mailbox:
        """Where packets of a tensor arrive; TypeError if it is an ordinary one."""
        if not isinstance(self.layout, Mailbox):
            raise TypeError(f"{self.name} is {self.layout}, where no packets arrive")
        return self.layout


@dataclass(frozen=True)
class TileProgram:
    """One kernel. `grid`: the axes its programs are numbered by, outermost first, all on one launch dimension."""

    name: str
    params: tuple[Param, ...]
    axes: tuple[AxisBlock, ...]
    grid: tuple[str, ...]
    body: tuple[Op, ...] = ()
    warps: int = 4
    stages: int = 2
    digest: str = ""

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

    def ordered(self, axes: Collection[str]) -> tuple[str, ...]:
        """`axes` in the order in which blocks have them."""
        return tuple(a.name for a in self.axes if a.name in axes)

    def blocked(self, axes: Collection[str]) -> tuple[str, ...]:
        """Those of `axes` that a block has a dimension for, in order."""
        return tuple(a.name for a in self.axes if a.name in axes and a.block > 1)

    def block(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of a block over `axes`."""
        return tuple(self.axis(a).block for a in axes)

    def bounded(self, axis: str) -> AxisBlock:
        """The block whose end says which lanes along `axis` hold an element: its own, or that of the axis it is twice."""
        return self.axis(self.axis(axis).of or axis)

    def turns(self, over: str | int) -> int:
        """How many turns a loop over an axis of static size has, or one of so many; TypeError if only a launch knows."""
        if isinstance(over, int):
            return over
        axis = self.axis(over)
        if axis.length is None:
            raise TypeError(f"{self.name}: how many blocks {over} has is known at a launch only")
        return -(-axis.length // axis.block)

    @property
    def counts(self) -> tuple[int | AxisBlock, ...]:
        """The number of programs along each grid axis; the axis itself where only a launch knows."""
        return tuple(a if a.extent is None else a.beside or a.blocks for a in map(self.axis, self.grid))

    def programs(self, sizes: Mapping[str, int]) -> int:
        """How many programs a launch has; `sizes` gives the dynamic extents."""
        return prod(n if isinstance(n, int) else -(-sizes[n.name] // n.block) for n in self.counts)

    def __str__(self) -> str:
        lines = [f"program {self.name}(" + ", ".join(p.name for p in self.params) + f")  # {self.digest}"]
        for p in self.params:
            lines.append(f"  {p.role.lower()} {p.name}: {p.dtype}[{', '.join(str(a) for a in p.axes)}] {p.layout}")
        for a in self.axes:
            extent = "dynamic" if a.extent is None else a.extent
            more = f", {a.parts} parts" * (a.parts > 1) + f", {a.beside} programs" * a.numbered * (a.mode == "loop")
            lines.append(f"  axis {a.name}: {extent} in {a.mode} blocks of {a.block}{more}")
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
        every = [p for s in self.sections for p in s.params]
        found = {p.name: p for p in every} | {p.name: p for p in every if p.role != "In"}
        return tuple(found.values())

    @property
    def axes(self) -> tuple[AxisBlock, ...]:
        """Every section's blocks; an axis may be held in several ways."""
        return tuple(a for s in self.sections for a in s.axes)

    def param(self, name: str) -> Param:
        """The tensor `name`."""
        return next(p for p in self.params if p.name == name)

    def programs(self, sizes: Mapping[str, int]) -> int:
        """How many programs a launch has."""
        return sum(s.programs(sizes) for s in self.sections)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.sections))


Kernel = TileProgram | Joined
