"""A Schedule: launches, in each launch sections, in each section directives. What chooses them is in rules/; passes obey.

Each directive says before → after, what is legal, and what it changes in the bits: nothing, or the order of sums. As text a
directive is its name and fields (`loop:D:256`); `Schedule` has the rest of the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from moekit.errors import ScheduleError


@dataclass(frozen=True)
class Tile:
    """`tile:T:16`. One program has all of an axis → each program has one block of 16; programs are numbered along it.

    Legal where every output of the section varies over the axis and nothing is reduced or scanned along it; a block of 1 where
    ids along it say where outputs go. Bits: none of a product on the matrix unit; lanes that add up along another axis of the
    same block can be other ones.
    """

    axis: str
    block: int


@dataclass(frozen=True)
class Whole:
    """`whole:H:2048`. An axis without a home → every program holds all of it in one block, the next power of two.

    Legal where its size is static. What runs along it is added up as one tree.
    """

    axis: str
    block: int


@dataclass(frozen=True)
class Loop:
    """`loop:D:256`. An axis held whole → every program goes along it, 256 elements at a time.

    Legal unless a scan or top_k, or an update that reads other elements, runs along it. Sums go turn by turn; a product on the
    matrix unit does so in either case.
    """

    axis: str
    block: int


@dataclass(frozen=True)
class Parts:
    """`parts:D:4`. One sum along a looped axis → four, each from zero, added up by the same program one after the other.

    `parts:D:4:256`: of 256 elements each, the last one of what is left. Legal where no output runs along the axis and its
    reductions are equally deep. The order of sums becomes that of `split`, bit by bit, where parts begin at the same elements.
    """

    axis: str
    count: int
    each: int = 0


@dataclass(frozen=True)
class Rounds:
    """`rounds:L.part:16`. A program for each block of a tiled axis → sixteen along it, which take the blocks in turn.

    A program ends where nothing more is stored: of rows that end early few programs have nothing to do. Legal for an axis of
    static size that has more blocks, beside no pair, prefetch or abreast, and where no ranks add up. Bits: none.
    """

    axis: str
    programs: int


@dataclass(frozen=True)
class Pair:
    """`pair:gate_up`. Two products of one operand with two blocks of columns of a tensor → one product twice as wide.

    Legal for products on the matrix unit of 16-bit operands, with more than one column a block. Bits: none.
    """

    tensor: str


@dataclass(frozen=True)
class Prefetch:
    """`prefetch:packed`. A weight is read when the launch before has ended → its lines are asked for while that still runs.

    Legal in a dependent launch, for an operand of static size of a product along a looped axis that blocks divide; it is a
    hint, and passed over where elements do not lie side by side along that axis. Bits: none.
    """

    tensor: str


@dataclass(frozen=True)
class Warps:
    """`warps:4`. The compiler's own choice → four warps for each program of the launch.

    Legal for a power of two to 32. Order of sums: one within a block is a tree over the lanes that hold it.
    """

    count: int


@dataclass(frozen=True)
class Stages:
    """`stages:4`. Loads of a loop when they are needed → loads of the turns ahead under way, in memory for 4 turns.

    Legal from 1 to 8. Bits: none.
    """

    count: int


@dataclass(frozen=True)
class Dependent:
    """`dependent`. A launch begins when the one before it has ended → its programs begin while that still runs.

    They wait for its end before they read or write anything: what is saved is the cost of a launch.

    Legal for any launch; passed over where a device, or what launches, does not have it. Bits: none.
    """


@dataclass(frozen=True)
class Abreast:
    """`abreast:T`. All programs of a section, then the next one's → all sections' programs of one block of T, then the next.

    What they read of it is then read from memory once. Legal where the sections have the same blocks of T as their outermost
    axis and every other axis their programs are numbered by is static. Bits: none.
    """

    axis: str


@dataclass(frozen=True)
class Split:
    """`split:D:4`. One sum along an axis in one launch → four parts of it in programs of their own, and a launch that adds up.

    It ends a launch; the next one has the axis `D.part`. Legal where the axis is looped over and all its reductions are equally
    deep. Order of sums: the parts', one after the other. `split:L:8:256`: in parts of 256 elements, which the size of the axis
    does not move; programs past a row's own end leave nothing, and the next launch reads nothing of them.
    """

    axis: str
    count: int
    each: int = 0


@dataclass(frozen=True)
class Stage:
    """`stage:hidden`. A value is made anew wherever it is needed → one launch makes it, the next reads it from scratch.

    It ends a launch; `stage:counts,starts` makes several; a value that the declaration does not name is called by what it is
    (`product_d`, `sum_h`, `rounded`, `placed`). Legal for the result of a product or sum, or of a narrowing cast, and for what
    is placed: anything else could be contracted with what uses it (a product and a sum to one rounding) in one kernel and not
    across two. Bits: none.
    """

    value: str

    @property
    def values(self) -> list[str]:
        """The values, by name."""
        return self.value.split(",")


Axis = Tile | Whole | Loop
OfSection = Tile | Whole | Loop | Parts | Rounds | Pair | Prefetch
OfLaunch = Warps | Stages | Dependent | Abreast | Split | Stage
WORDS = {d.__name__.lower(): d for d in (*OfSection.__args__, *OfLaunch.__args__)}


def text_of(directive: OfSection | OfLaunch) -> str:
    """`loop:D:256`."""
    said = [str(x) for f in fields(directive) if (x := getattr(directive, f.name)) != f.default]
    return ":".join([type(directive).__name__.lower(), *said])


def directive_of(text: str) -> OfSection | OfLaunch:
    """What `text_of` wrote; KeyError or ValueError for anything else."""
    word, *given = text.split(":")
    kind = WORDS[word]
    if len(given) > len(fields(kind)):
        raise ValueError(f"{word} takes {len(fields(kind))} fields")
    typed = [int(x) if f.type == "int" else x for f, x in zip(fields(kind), given, strict=False)]
    return kind(*typed)


def subject(directive: OfSection | OfLaunch) -> tuple:
    """What only one directive can be about: an axis's place, a tensor's pairing, a launch's warps or its end."""
    if isinstance(directive, Axis):
        return "axis", directive.axis
    if isinstance(directive, Split | Stage):
        return ("cut",)
    return (type(directive), directive.tensor) if isinstance(directive, Pair | Prefetch) else (type(directive),)


class _Directed:
    directives: tuple[Any, ...]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # of the classes below

    def but(self, *changed: OfSection | OfLaunch) -> Self:
        """The same with some directives changed, or added."""
        new = {subject(d): d for d in changed}
        kept = [new.pop(subject(d), d) for d in self.directives]
        return replace(self, directives=(*kept, *new.values()))

    def without(self, *kinds: type) -> Self:
        """The same without directives of some kinds."""
        return replace(self, directives=tuple(d for d in self.directives if not isinstance(d, kinds)))

    def all[D](self, kind: type[D]) -> list[D]:
        """The directives of a kind."""
        return [d for d in self.directives if isinstance(d, kind)]


@dataclass(frozen=True)
class Section(_Directed):
    """Programs of one kind within a launch: what they make (`outputs`; nothing said is all of the launch), and how."""

    outputs: tuple[str, ...] = ()
    directives: tuple[OfSection, ...] = ()
    MODES: ClassVar[Mapping[type, str]] = {Tile: "grid", Whole: "whole", Loop: "loop"}

    @property
    def axes(self) -> list[Axis]:
        """What is done with each axis."""
        return [d for d in self.directives if isinstance(d, Axis)]

    @property
    def parts(self) -> dict[str, int]:
        """The axes of which a program does several parts."""
        return {d.axis: d.count for d in self.all(Parts)}

    @property
    def each(self) -> dict[str, int]:
        """The elements of such a part, where a number is said."""
        return {d.axis: d.each for d in self.all(Parts) if d.each}

    def axis(self, axis: str) -> Axis:
        """What is done with an axis; KeyError if nothing is said."""
        return {d.axis: d for d in self.axes}[axis]

    def mode(self, axis: str) -> str:
        """`grid`, `whole` or `loop`, as the tile IR has it."""
        return self.MODES[type(self.axis(axis))]

    def block(self, axis: str) -> int:
        """Elements of `axis` that a program holds at a time."""
        return self.axis(axis).block

    def __str__(self) -> str:
        return " ".join(map(text_of, self.directives))


@dataclass(frozen=True)
class Launch(_Directed):
    """One kernel: sections, whose programs run side by side, and what they share."""

    sections: tuple[Section, ...]
    directives: tuple[OfLaunch, ...] = ()

    @property
    def warps(self) -> int:
        """Of each program."""
        return next((d.count for d in self.all(Warps)), 4)

    @property
    def stages(self) -> int:
        """Of the loops of each program."""
        return next((d.count for d in self.all(Stages)), 2)

    @property
    def dependent(self) -> bool:
        """Whether its programs begin while the launch before it still runs."""
        return Dependent() in self.directives

    @property
    def cut(self) -> Split | Stage | None:
        """How what it leaves is taken up by the next launch; None for the last."""
        return next((d for d in self.directives if isinstance(d, Split | Stage)), None)

    def lines(self) -> list[str]:
        """Its text, a line for each section, then one for what they share."""
        alone = len(self.sections) == 1 and not self.sections[0].outputs
        sections = [str(self.sections[0])] if alone else [f"{','.join(s.outputs)}({s})" for s in self.sections]
        return [line for line in (*sections, " ".join(map(text_of, self.directives))) if line]

    def __str__(self) -> str:
        return " ".join(self.lines())


@dataclass(frozen=True)
class Schedule:
    """How a graph becomes kernels.

    As text: launches between `then`, in each the directives of its sections, `OUTPUT,OUTPUT(…)` where there are several, and
    its own: `loop:D:256 tile:P:32 tile:T:16 warps:4 split:D:4 then tile:P:256 loop:D.part:1 tile:T:1 warps:4 dependent`.
    """

    launches: tuple[Launch, ...]

    def __str__(self) -> str:
        return " then ".join(map(str, self.launches))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` writes, whatever the white space. Raises ScheduleError for what is no schedule."""
        try:
            return cls(tuple(_launch(part) for part in re.split(r"(?:^|\s+)then(?:\s+|$)", text.strip())))
        except (KeyError, ValueError, TypeError):
            form = "write DIRECTIVE:AXIS:BLOCK … warps:N stages:N, as in `tile:T:1 loop:H:1024 warps:4 stages:2`"
            raise ScheduleError(f"cannot read schedule {text!r}; {form}") from None


_SECTION = re.compile(r"([^\s()]*)\(([^()]*)\)")


def _launch(text: str) -> Launch:
    sections = [
        Section(tuple(filter(None, outs.split(","))), _of(inside, OfSection)) for outs, inside in _SECTION.findall(text)
    ]
    loose = [directive_of(word) for word in _SECTION.sub(" ", text).split()]
    own = tuple(d for d in loose if isinstance(d, OfSection))
    if sections and own:
        raise ValueError("directives of a section beside sections")
    return Launch(tuple(sections) or (Section((), own),), tuple(d for d in loose if isinstance(d, OfLaunch)))


def _of(text: str, kinds) -> tuple:
    found = tuple(directive_of(word) for word in text.split())
    if not all(isinstance(d, kinds) for d in found):
        raise ValueError("a launch's directive within a section")
    return found


def pow2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
