"""Hand-broken programs: for each rule of `moekit.compile.tile.verify`, good programs with one thing wrong (`break_*.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import programs as good

from moekit.compile import tile as t

Breaker = Callable[[], t.TileProgram]
BREAKERS: dict[str, list[tuple[str, Breaker]]] = {}


def breaks(rule: str) -> Callable[[Breaker], Breaker]:
    """Note that a program must be refused by `rule`."""

    def note(make: Breaker) -> Breaker:
        BREAKERS.setdefault(rule, []).append((make.__name__, make))
        return make

    return note


def with_axis(program: t.TileProgram, name: str, **changes) -> t.TileProgram:
    """The program with one axis changed."""
    return replace(program, axes=tuple(replace(a, **changes) if a.name == name else a for a in program.axes))


def with_ops(program: t.TileProgram, kind: type, when: Callable = lambda op: True, **changes) -> t.TileProgram:
    """The program with fields of the first operation of a kind changed."""
    done = []

    def change(op):
        if isinstance(op, kind) and not done and when(op):
            done.append(op)
            return replace(op, **changes)
        return op

    changed = good.edit(program, change)
    assert done, "the operation to break is not there"
    return changed


def without(program: t.TileProgram, when: Callable) -> t.TileProgram:
    """The program without the operations for which `when` holds."""
    return good.edit(program, lambda op: None if when(op) else op)
