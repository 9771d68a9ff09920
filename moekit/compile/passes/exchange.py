"""A sum over ranks becomes packets: a program sends its rows to every rank, waits for theirs, and adds them up in order.

Each row has an epoch of its own, the number of times it has been sent, which its program counts up: nothing else does, and a
call without the row counts nothing. docs/collectives.md says why two slots then suffice.
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.tile.layouts import epochs_name

FIRST_AGAIN = 2  # after the last epoch: 0 is no packet's, and slots take turns


def exchange(program: t.TileProgram) -> t.TileProgram:
    """The program with sends and receives for each sum over ranks."""
    numbers = t.Numbers(program.body)
    return replace(
        program,
        body=t.rewrite(program.body, lambda op: _packets(program, numbers, op) if isinstance(op, t.AllReduce) else None),
    )


def _packets(program: t.TileProgram, numbers: t.Numbers, op: t.AllReduce) -> list[t.Op]:
    """All sends come before the first receive, and the row's epoch is kept when every thread has read it."""
    d, numbers.line = t.Draft(program, numbers), op.out.line
    row = t.Access(epochs_name(op.axis), op.at.index[:1])
    later = d.binary("add", d.emit(t.Load, "epoch_before", at=row), d.const(1), "later")
    epoch = d.where(d.binary("eq", later, d.const(0)), d.const(FIRST_AGAIN), later, "epoch")
    sent, total = op.value, None
    for peer in range(op.ranks):
        sent = d.emit(t.Send, "sent", value=sent, epoch=epoch, at=op.at, peer=peer)
    received = [d.emit(t.Receive, f"part_{n}", after=sent, epoch=epoch, at=op.at, sender=n) for n in range(op.ranks)]
    for part in received:
        part = d.cast(part, "float32")
        total = part if total is None else d.binary("add", total, part)
    return [*d.becomes(op.out), t.Barrier(), t.Store(row, epoch)]
