"""The programs of the tile IR: how blocks cover axes, where tensors lie, and the kernels made of both and of operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from moekit.compile.tile.operations import Op, text_of


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
    def blocks(self) -> int:
        """How many blocks the axis has (static axes only)."""
        return -(-(self.extent or 0) // self.block)

    @property
    def share(self) -> int:
        """Elements of the axis that one part covers, a multiple of the block (static axes only)."""
        return -(-self.blocks // self.parts) * self.block


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
