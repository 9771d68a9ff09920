"""The rules of the tile IR, as a table. Every program passes them after every lowering; each has a test that breaks it."""

from __future__ import annotations

from collections.abc import Callable

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, facts_of
from moekit.compile.tile.verify.loops import flat_loops, grid, loops_cover, reductions_masked, reductions_whole
from moekit.compile.tile.verify.memory import hints_first, memory_masked, outputs_written, stores_last, wide_offsets
from moekit.compile.tile.verify.values import blocks, defined_once, types
from moekit.errors import VerifyError

__all__ = ["RULES", "Facts", "abreast", "facts_of", "sections_apart", "verify"]

RULES: dict[str, Callable[[Facts], None]] = {
    rule.__name__: rule
    for rule in (
        blocks,
        defined_once,
        types,
        grid,
        loops_cover,
        flat_loops,
        memory_masked,
        reductions_masked,
        reductions_whole,
        wide_offsets,
        stores_last,
        hints_first,
        outputs_written,
    )
}

DERIVED = ("memory_masked", "reductions_masked", "wide_offsets")


def sections_apart(kernel: t.Kernel) -> None:
    """What one section of a launch writes, no other section reads or writes: their programs run in any order."""
    for one in kernel.sections:
        for p in (p for p in one.params if p.role != "In"):
            for other in kernel.sections:
                if other is not one and any(q.name == p.name for q in other.params):
                    hint = f"{p.name} is written by {one.name} and used by {other.name} in the same launch; join the two"
                    raise VerifyError(f"{kernel.name}: sections apart: {hint}")


def abreast(kernel: t.Kernel) -> None:
    """Sections that take turns have the same blocks along their outermost axis, and a known number of programs for each."""
    if not isinstance(kernel, t.Joined) or not kernel.abreast:
        return
    outermost = kernel.sections[0].axis(kernel.sections[0].grid[0])
    for s in kernel.sections:
        if not s.grid or s.axis(s.grid[0]) != outermost or any(s.axis(a).extent is None for a in s.grid[1:]):
            hint = f"{s.name} has other blocks than {kernel.sections[0].name}; let one section follow the other"
            raise VerifyError(f"{kernel.name}: abreast: {hint}")


def verify(kernel: t.Kernel, before_masks: bool = False) -> None:
    """Check a kernel against every rule; raises VerifyError naming the rule, the operation and a hint.

    `before_masks`: of a program on its way, those left out that the derived masks and widths are for.
    """
    sections_apart(kernel)
    abreast(kernel)
    for section in kernel.sections:
        facts = facts_of(section)
        for name, rule in RULES.items():
            if not (before_masks and name in DERIVED):
                rule(facts)
