"""A loop over the parts of an axis and the one over a part's blocks become one, so that loads stay in flight between parts.

What stands after the inner loop is done in the last of its turns. Triton's software pipeline, and a wgmma on its way, then go
on over the end of a part. Only a single product does so: several would not overlap then (Triton 3.6 waits for each of them).
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.schedule.facts import part_axis

MOST = 1  # products in a loop that becomes one with the loop around


def flatten(program: t.TileProgram) -> t.TileProgram:
    """The program without loops around a loop over at most so many products."""
    numbers = t.Numbers(program.body)
    return replace(program, body=t.rewrite(program.body, lambda op: _flat(numbers, op)))


def _flat(numbers: t.Numbers, op: t.Op) -> list[t.Op] | None:
    """The one loop, after what its sums begin from; None where `op` is no loop over parts of a product."""
    if not isinstance(op, t.Loop) or op.unroll or len(inner := [o for o in op.body if isinstance(o, t.Loop)]) != 1:
        return None
    (loop,) = inner
    if loop.end is not None:
        return None
    products = {o.out for o in loop.body if isinstance(o, t.Dot)}
    if not 0 < len(loop.yields) <= MOST or not products >= set(loop.yields) or not _in_parts(op, loop):
        return None
    at = op.body.index(loop)
    begin = tuple(o for o in op.body[:at] if isinstance(o, t.Const))
    last = dict(zip(loop.outs, loop.yields, strict=True))
    tail = tuple(t.substitute(o, last) for o in op.body[at + 1 :])
    ended, outs = ((*t.substitute(op.yields, last), *loop.inits), tuple(map(numbers.like, (*op.carries, *loop.carries))))
    end = t.AtEnd(str(loop.over[0]), tail, ended, (*op.carries, *loop.yields), outs)
    body = (*(o for o in op.body[:at] if o not in begin), *loop.body, end)
    carries, inits = (*op.carries, *loop.carries), (*op.inits, *loop.inits)
    results = (*op.outs, *map(numbers.like, loop.outs))
    return [*begin, t.Loop((*op.vars, *loop.vars), (*op.over, *loop.over), carries, inits, body, outs, results)]


def _in_parts(outer: t.Loop, inner: t.Loop) -> bool:
    """Whether one loop goes over the parts of the axis that the other goes over."""
    return outer.over == tuple(part_axis(str(axis)) for axis in inner.over)
