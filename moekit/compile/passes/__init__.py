"""The list: what a graph goes through on its way to a program, in order, one file each. `nest` makes the program; each of the
others takes one and gives one, and nothing else changes it. Names are given when text is printed (`names.py`).

With `MOEKIT_TRACE=dir` in the environment the program after every pass is written to a file in `dir`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from moekit.compile import tile as t
from moekit.compile.passes.apart import apart
from moekit.compile.passes.choices import choices
from moekit.compile.passes.decompose import decompose
from moekit.compile.passes.exchange import exchange
from moekit.compile.passes.flatten import flatten
from moekit.compile.passes.legalise import legalise
from moekit.compile.passes.masks import masks
from moekit.compile.passes.motion import motion
from moekit.compile.passes.nest import nest
from moekit.compile.passes.prefetch import prefetch
from moekit.compile.passes.rounds import rounds
from moekit.compile.passes.scope import Layouts
from moekit.compile.passes.tidy import tidy
from moekit.compile.schedule.directives import Prefetch, Rounds, Section
from moekit.compile.schedule.targets import TARGETS
from moekit.files import make_folder, write_text
from moekit.lang.graph import Graph

Watch = Callable[[str, t.TileProgram], None]


@dataclass(frozen=True)
class How:
    """What passes obey: the schedule's section, and the target, a row of `TARGETS`."""

    section: Section
    target: str


Pass = Callable[[t.TileProgram, How], t.TileProgram]
PASSES: dict[str, Pass] = {
    "decompose": lambda program, how: decompose(program),
    "exchange": lambda program, how: exchange(program),
    "rounds": lambda program, how: rounds(program, {d.axis: d.programs for d in how.section.all(Rounds)}),
    "prefetch": lambda program, how: prefetch(program, {d.tensor for d in how.section.all(Prefetch)}),
    "masks": lambda program, how: masks(program),
    "choices": lambda program, how: choices(program),
    "motion": lambda program, how: motion(program, TARGETS[how.target].early_byte),
    "flatten": lambda program, how: flatten(program),
    "legalise": lambda program, how: legalise(program, how.target),
    "tidy": lambda program, how: tidy(program),
    "apart": lambda program, how: apart(program) if TARGETS[how.target].told else program,
}

_watch: ContextVar[Watch | None] = ContextVar("moekit_watch", default=None)


def lower(
    graph: Graph,
    section: Section,
    layouts: Layouts,
    sizes: Mapping[str, int] | None = None,
    digest: str = "",
    warps: int = 4,
    stages: int = 2,
    target: str | None = None,
) -> t.TileProgram:
    """The tile program of `graph` under a legal `section`; `sizes` fixes dynamic axes where they are known (JAX).

    Tensors that are part of arrays are for Pallas if no `target` is named, those behind pointers for Triton.
    """
    how = How(section, target or ("pallas" if any(isinstance(x, t.Viewed) for x in layouts.values()) else "triton"))
    program = replace(nest(graph, section, layouts, sizes or {}), digest=digest, warps=warps, stages=stages)
    watches = [w for w in (_watch.get(), _tracer(os.environ.get("MOEKIT_TRACE"), program, how)) if w]
    for name, apply in {"nest": lambda program, how: program, **PASSES}.items():
        program = apply(program, how)
        for see in watches:
            see(name, program)
    return program


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Show `watch` the program after every pass, with the pass's name, while this is open."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _tracer(folder: str | None, first: t.TileProgram, how: How) -> Watch | None:
    """What writes `<program>.<digest>.<target>.<number of its own>/<number>.<pass>.txt`; None without a folder.

    The number is of the section and the text that the first pass makes: programs of other schedules or sizes have others.
    """
    if not folder:
        return None
    names, own = ["nest", *PASSES], sha256(f"{how.section}\n{first}".encode()).hexdigest()[:8]

    def write(name: str, program: t.TileProgram) -> None:
        path = Path(folder) / f"{program.name}.{program.digest}.{how.target}.{own}" / f"{names.index(name):02}.{name}.txt"
        make_folder(path.parent)
        write_text(path, f"{program}\n")

    return write
