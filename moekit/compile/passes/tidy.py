"""Nothing is said twice, and nothing that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, facts_of

ALIKE = (t.Const, t.Extent, t.InBounds)  # cheap, and made by several passes


def tidy(program: t.TileProgram) -> t.TileProgram:
    """The program with numbers first, each once, and without operations whose results go nowhere."""
    numbers = [op for op, _ in t.walk(program.body) if isinstance(op, t.Const) and not op.out.axes]
    numbers.sort(key=lambda op: not op.out.name)
    rest = t.rewrite(program.body, lambda op: [] if op in numbers else None)
    return replace(program, body=t.used(_loaded_once(program, _once((*numbers, *rest), {}, {}), {}, facts_of(program))))


def _once(ops: Iterable[t.Op], known: dict, same: dict[t.Value, t.Value]) -> list[t.Op]:
    """The operations without those that are `known`, by what they say; `same` are the results that others stand for."""
    known, found = dict(known), []
    for op in ops:
        op = t.substitute(op, same)
        if isinstance(op, t.Loop | t.AtEnd):
            op = replace(op, body=tuple(_once(op.body, known, same)))
        if isinstance(op, ALIKE):
            said = (type(op), op.out.dtype, op.out.axes, *(repr(getattr(op, n)) for n in op.__dataclass_fields__ if n != "out"))
            if said in known:
                same[op.out] = known[said]
                continue
            known[said] = op.out
        found.append(op)
    return found


def _loaded_once(program: t.TileProgram, ops: Iterable[t.Op], known: dict, f: Facts) -> list[t.Op]:
    """The operations without loads of what is `known` along other axes, held whole in the same blocks."""
    known, found = dict(known), []
    for op in ops:
        if isinstance(op, t.Loop | t.AtEnd):
            op = replace(op, body=tuple(_loaded_once(program, op.body, known, f)))
        elif isinstance(op, t.Load) and op.out.axes and program.param(op.at.tensor).role == "In":
            places = [_said(program, v, f) for i in op.at.index for v in (i.start, *i.terms)]
            said = op.at.tensor, op.fill, *places, *sorted(repr(_said(program, v, f)) for v in op.at.mask)
            if (other := known.setdefault(said, op)) is not op and _along(other, op):
                op = t.Along(op.out, other.out)
        found.append(op)
    return found


def _said(program: t.TileProgram, value: Any, f: Facts) -> object:
    """What a number, a term or a mask of an access says, axes that are held alike by how they are held."""
    if isinstance(value, tuple):
        return tuple(_said(program, v, f) for v in value)
    op = f.made_by.get(value) if isinstance(value, t.Value) else None
    if not isinstance(op, t.Elements | t.InBounds):
        return value
    axis = program.axis(op.axis)
    if isinstance(op, t.InBounds):
        return "inside", axis.extent, op.signed, _said(program, op.value, f)
    return ("elements", axis.extent, axis.block) if axis.mode == "whole" else value


def _along(one: t.Load, other: t.Load) -> bool:
    """Whether the same elements of memory are the same elements of both blocks."""
    mine, others = ([v.axes for i in x.at.index for v in i.values] for x in (one, other))
    renamed = {a: b for v, w in zip(mine, others, strict=True) for a, b in zip(v, w, strict=True)}
    return tuple(renamed.get(a) for a in one.out.axes) == other.out.axes
