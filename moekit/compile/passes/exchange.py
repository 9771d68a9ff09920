"""A sum over ranks becomes packets: a program sends its rows to every rank, waits for theirs, and adds them up in order. A
packet is 32 bits, those of one element or of neighbours, and an epoch; as many neighbours go at once as `carried` says.

Each row has an epoch of its own, the number of times it has been sent, which its program counts up: nothing else does, and a
call without the row counts nothing. docs/collectives.md says why two slots then suffice.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.tile.layouts import PAIR, carried, epochs_name
from moekit.lang.dtypes import int_of_width, itemsize

FIRST_AGAIN = 2  # after the last epoch: 0 is no packet's, and slots take turns


def exchange(program: t.TileProgram) -> t.TileProgram:
    """The program with sends and receives for each sum over ranks."""
    numbers, ways = t.Numbers(program.body), []
    for op in (op for op, _ in t.walk(program.body) if isinstance(op, t.AllReduce)):
        program = _with_packets(program, op)

    def rule(op: t.Op) -> list[t.Op] | None:
        if not isinstance(op, t.AllReduce):
            return None
        names = [*(f"to_{n}" for n in range(op.ranks)), *(f"from_{n}" for n in range(op.ranks)), "errors", "most"]
        ways.append(t.Ways(tuple(numbers.value("int64", (), name) for name in names), op.at.tensor))
        return _packets(t.Draft(program, numbers), op, ways[-1].outs)

    body = t.rewrite(program.body, rule)
    return replace(program, body=(*ways, *body))  # on their way before anything else


def _with_packets(program: t.TileProgram, op: t.AllReduce) -> t.TileProgram:
    """The program with an axis of a row's accesses, where they are of several elements each."""
    mail = program.param(op.at.tensor)
    if (each := carried(program, mail)) == 1:
        return program
    last = program.axis(mail.axes[-1] or "")
    own = t.AxisBlock(_access_axis(last.name), -(-(last.extent or 0) // each), last.block // each, "whole")
    at = program.axes.index(last) + 1
    return replace(program, axes=(*program.axes[:at], own, *program.axes[at:]))


def _access_axis(axis: str) -> str:
    """The name of the axis that counts groups of neighbours along another one."""
    return f"{axis}.packets"


def _packets(d: t.Draft, op: t.AllReduce, ways: tuple[t.Value, ...]) -> list[t.Op]:
    """All sends come before the first receive, and the row's epoch is kept when every thread has read it."""
    d.numbers.line = op.out.line
    row = t.Access(epochs_name(op.axis), op.at.index[:1])
    later = d.binary("add", d.emit(t.Load, "epoch_before", at=row), d.const(1), "later")
    epoch = d.where(d.binary("eq", later, d.const(0)), d.const(FIRST_AGAIN), later, "epoch")
    at, bits = _neighbours(d, op)
    sent, *others = _words(d, bits)
    for peer in range(op.ranks):
        sent = d.emit(t.Send, "sent", values=(sent, *others), epoch=epoch, at=at, way=ways[peer], peer=peer)
    given = {"own": (sent, *others), "epoch": epoch, "at": at, "errors": ways[-2], "most": ways[-1]}
    came = [tuple(d.numbers.value("int32", sent.axes, f"part_{n}") for _ in (0, *others)) for n in range(op.ranks)]
    d.ops += [t.Receive(words, way=ways[op.ranks + n], sender=n, **given) for n, words in enumerate(came)]
    parts = [d.cast(_read(d, words, len(bits), op.value), "float32") for words in came]
    reduce(lambda a, b: d.binary("add", a, b), parts)
    return [*d.becomes(op.out), t.Barrier(), t.Store(row, epoch)]


def _neighbours(d: t.Draft, op: t.AllReduce) -> tuple[t.Access, list[t.Value]]:
    """Where a row's accesses are, and the bits of the elements of each: the k-th block has the k-th of every one."""
    bits = d.emit(t.Bitcast, "", int_of_width(op.value.dtype), value=op.value)
    if (n := carried(d.program, d.program.param(op.at.tensor))) == 1:
        return op.at, [bits]
    axis = bits.axes[-1]
    into = _access_axis(axis)
    groups = d.emit(t.Elements, f"{identifier(axis)}_by{n}", axis=into)
    apart = [d.numbers.value(bits.dtype, (*bits.axes[:-1], into), "bits") for _ in range(n)]
    d.ops.append(t.Deinterleave(tuple(apart), bits, axis, into))
    return t.Access(op.at.tensor, (*op.at.index[:-1], t.Index.of(groups))), apart


def _words(d: t.Draft, bits: list[t.Value]) -> list[t.Value]:
    """The data of an access: words of 32 bits, of one element or of neighbours, the first one's lowest."""
    width, words = 8 * itemsize(bits[0].dtype), []
    each = max(1, len(bits) // PAIR)
    for begin in range(0, len(bits), each):
        first, *others = bits[begin : begin + each]
        word = d.cast(first, "int32")
        if others:
            word = d.binary("and", word, d.const(2**width - 1))
        for k, x in enumerate(others, 1):
            word = d.binary("or", word, d.binary("shl", d.cast(x, "int32"), d.const(width * k)))
        words.append(word)
    return words


def _read(d: t.Draft, words: tuple[t.Value, ...], n: int, like: t.Value) -> t.Value:
    """The floats that the packets of an access have brought, `n` in each, along the axes that they were sent from."""
    kind, width, bits = int_of_width(like.dtype), 8 * itemsize(like.dtype), []
    for word in words:
        for k in range(n // len(words)):
            bits.append(d.cast(d.binary("shr", word, d.const(width * k)) if k else word, kind))
    if n > 1:
        axis = like.axes[-1]
        bits = [d.emit(t.Interleave, values=tuple(bits), axis=axis, by=_access_axis(axis))]
    return d.emit(t.Bitcast, "", like.dtype, value=bits[0])
