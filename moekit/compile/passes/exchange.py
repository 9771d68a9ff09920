"""A sum over ranks becomes packets: a program sends its rows to every rank, waits for theirs, and adds them up in order. A
packet is the bits of one element and an epoch.

Each row has an epoch of its own, the number of times it has been sent, which its program counts up: nothing else does, and a
call without the row counts nothing. docs/collectives.md says why two slots then suffice.
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.tile.layouts import epochs_name
from moekit.lang.dtypes import int_of_width

FIRST_AGAIN = 2  # after the last epoch: 0 is no packet's, and slots take turns


def exchange(program: t.TileProgram) -> t.TileProgram:
    """The program with sends and receives for each sum over ranks."""
    numbers, ways = t.Numbers(program.body), []

    def rule(op: t.Op) -> list[t.Op] | None:
        if not isinstance(op, t.AllReduce):
            return None
        names = [*(f"to_{n}" for n in range(op.ranks)), *(f"from_{n}" for n in range(op.ranks)), "errors", "most"]
        ways.append(t.Ways(tuple(numbers.value("int64", (), name) for name in names), op.at.tensor))
        return _packets(program, numbers, op, ways[-1].outs)

    body = t.rewrite(program.body, rule)
    return replace(program, body=(*ways, *body))  # on their way before anything else


def _packets(program: t.TileProgram, numbers: t.Numbers, op: t.AllReduce, ways: tuple[t.Value, ...]) -> list[t.Op]:
    """All sends come before the first receive, and the row's epoch is kept when every thread has read it."""
    d, numbers.line = t.Draft(program, numbers), op.out.line
    row = t.Access(epochs_name(op.axis), op.at.index[:1])
    later = d.binary("add", d.emit(t.Load, "epoch_before", at=row), d.const(1), "later")
    epoch = d.where(d.binary("eq", later, d.const(0)), d.const(FIRST_AGAIN), later, "epoch")
    sent, total = _bits(d, op.value), None
    for peer in range(op.ranks):
        sent = d.emit(t.Send, "sent", value=sent, epoch=epoch, at=op.at, way=ways[peer], peer=peer)
    given = {"after": sent, "epoch": epoch, "at": op.at, "errors": ways[-2], "most": ways[-1]}
    received = [d.emit(t.Receive, f"part_{n}", way=ways[op.ranks + n], sender=n, **given) for n in range(op.ranks)]
    for part in received:
        part = d.cast(_read(d, part, op.value.dtype), "float32")
        total = part if total is None else d.binary("add", total, part)
    return [*d.becomes(op.out), t.Barrier(), t.Store(row, epoch)]


def _bits(d: t.Draft, value: t.Value) -> t.Value:
    """A float as the 32 bits that a packet takes beside its epoch."""
    return d.cast(d.emit(t.Bitcast, "", int_of_width(value.dtype), value=value), "int32")


def _read(d: t.Draft, bits: t.Value, dtype: str) -> t.Value:
    """The float that a packet's bits are."""
    return d.emit(t.Bitcast, "", dtype, value=d.cast(bits, int_of_width(dtype)))
