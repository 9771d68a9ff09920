"""Nothing is said twice, and nothing that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moekit.compile import tile as t

ALIKE = (t.Const, t.Extent, t.InBounds)  # cheap, and made by several passes


def tidy(program: t.TileProgram) -> t.TileProgram:
    """The program with numbers first, each once, and without operations whose results go nowhere."""
    numbers = [op for op, _ in t.walk(program.body) if isinstance(op, t.Const) and not op.out.axes]
    numbers.sort(key=lambda op: not op.out.name)
    rest = t.rewrite(program.body, lambda op: [] if op in numbers else None)
    return replace(program, body=t.used(_once((*numbers, *rest), {}, {})))


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
