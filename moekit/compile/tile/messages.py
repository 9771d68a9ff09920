"""The rule of packets and flags between ranks: what the argument that they are sound needs (docs/collectives.md)."""

from __future__ import annotations

from collections.abc import Iterator

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, depends
from moekit.compile.tile.layouts import carried, words_of

Claims = Iterator[tuple[t.Op | None, bool, str]]


def packets(f: Facts) -> Claims:
    """A program sends whole rows of its own to every rank once, before it waits for anyone's; then it keeps the rows' epoch.

    One that takes several rows does so with one after the other, in the order of rows on every rank.
    """
    found = [(op, around) for op, around in f.ops if isinstance(op, t.Packet)]
    sends = {op.peer: op for op, _ in found if isinstance(op, t.Send)}
    receives = [op for op, _ in found if isinstance(op, t.Receive)]
    for n, (op, around) in enumerate(found):
        param = f.program.param(op.at.tensor)
        everyone = list(range(param.mailbox.ranks))
        yield op, _row_by_row(f, op, around), "it is in a loop, whose turns would wait for each other's packets; put it outside"
        waits = isinstance(op, t.Send) and any(isinstance(x, t.Receive) for x, _ in found[:n])
        yield op, not waits, "it comes after a wait for other ranks, which wait for it; send everything first"
        alike = (op.at, _number(f, op.epoch)) == (found[0][0].at, _number(f, found[0][0].epoch))
        yield op, alike, "its elements or epoch are not those of the program's other packets"
        for sent in sends.values():
            after = not isinstance(op, t.Receive) or any(depends(f, v, {sent.out}, set()) for v in op.own)
            yield op, after, f"nothing keeps it behind what is sent to rank {sent.peer}; let it read {sent.out.label}"
        if param.mailbox.flags:
            yield from _flags_up(f, op, [*sends.values()])
        yield op, [*sends] == everyone, f"packets go to ranks {[*sends]}; they must go to each of {everyone} once"
        senders = [x.sender for x in receives]
        yield op, senders == everyone, f"packets come from ranks {senders}; they must come from each of {everyone} once"
        ways = [x.outs for x in f.only(t.Ways) if x.tensor == param.name]
        way = ways[0][op.peer if isinstance(op, t.Send) else param.mailbox.ranks + op.sender] if len(ways) == 1 else None
        yield op, op.way == way, f"{op.way.label} is not its way to or from that rank"
        rows = param.axes[0]
        for axis in f.program.grid:
            yield op, axis == rows, f"programs along {axis} would share the packets and epochs of a row; hold it whole"
        yield from _as_wide(f, op, param)
        if sends:
            yield op, _alike_words(op, [*sends.values()]), "its words are not those that the first rank is sent, in their order"
        yield from _epochs_kept(f, op)


def _row_by_row(f: Facts, op: t.Packet, around: tuple[t.Loop | t.AtEnd, ...]) -> bool:
    """Whether an operation is in no loop, or in that by which a program goes from one of its rows to a later one."""
    rows = f.program.param(op.at.tensor).axes[0] or ""
    return not around or (len(around) == 1 and isinstance(around[0], t.Loop) and around[0].over == (rows,)
                          and f.program.axis(rows).beside > 0)  # fmt: skip


def _number(f: Facts, epoch: t.Value) -> t.Value:
    """The epoch that flags which were raised hand on."""
    while isinstance(op := f.made_by.get(epoch), t.Raise):
        epoch = op.epoch
    return epoch


def _flags_up(f: Facts, op: t.Packet, sends: list[t.Send]) -> Claims:
    """A row's flag goes up at every rank once, behind what all lanes have sent there and before anything is waited for."""
    raised = {x.peer: x for x in f.only(t.Raise) if x.at.tensor == op.at.tensor}
    everyone = [x.peer for x in sends]
    ways = [x.outs for x in f.only(t.Ways) if x.tensor == op.at.tensor]
    yield op, [*raised] == everyone, f"flags go up at ranks {[*raised]}; they must at each of {everyone} once"
    for x in raised.values():
        yield x, x.at.index[:1] == op.at.index[:1], "it is another row's flag than that of what is sent"
        yield x, len(ways) == 1 and x.way == ways[0][x.peer], f"{x.way.label} is not its way to that rank"
        yield x, _number(f, x.epoch) == sends[0].epoch, f"{x.epoch.label} is not the epoch of what is sent"
        for sent in sends:
            behind = _brought_together(f, x.after, sent.out)
            yield x, behind, f"nothing keeps it behind what all lanes send to rank {sent.peer}; let it read a maximum of that"
        if isinstance(op, t.Receive):
            after = depends(f, op.epoch, {x.out}, set())
            yield op, after, f"nothing keeps it behind the flag at rank {x.peer}; let it read {x.out.label}"


def _brought_together(f: Facts, value: t.Value, sent: t.Value) -> bool:
    """Whether a value is made of a block that was sent, by a reduction over all of its lanes."""
    op = f.made_by.get(value)
    if isinstance(op, t.Reduce):
        whole = not value.axes and set(op.value.axes) <= {op.axis}
        return whole and depends(f, op.value, {sent}, set())
    return False


def _alike_words(op: t.Packet, sends: list[t.Send]) -> bool:
    """Whether what is sent, or is a rank's own part, is what the first rank is sent; a send hands its first word on."""
    words, first = op.own if isinstance(op, t.Receive) else op.values, sends[0].values
    return words[1:] == first[1:] and words[0] in (first[0], *(sent.out for sent in sends))


def _as_wide(f: Facts, op: t.Packet, mail: t.Param) -> Claims:
    """An access is of as many elements, in as many packets, as it is on every other rank."""
    last, n = f.program.axis(mail.axes[-1] or ""), carried(f.program, mail)
    along = f.made_by.get(op.at.index[-1].alone)
    own = f.program.axis(along.axis) if isinstance(along, t.Elements) else None
    wanted = (-(-(last.extent or 0) // n), last.block // n) if n > 1 else (last.extent, last.block)
    fits = own is not None and (own.extent, own.block) == wanted
    yield op, fits, f"its accesses have not the {n} elements each that other ranks' have"
    fits = op.words == (words_of(mail.mailbox.flags) if n > 1 else 1)
    yield op, fits, f"its accesses are of {op.words} packets, which are not those of other ranks"


def _epochs_kept(f: Facts, op: t.Packet) -> Claims:
    """An epoch is made of its rows' last one, and kept when every thread has read that."""
    read = [x for x in f.only(t.Load) if depends(f, _number(f, op.epoch), {x.out}, set())]
    ops, row = [x for x, _ in f.ops], read[0].at if read else None
    kept = [n for n, x in enumerate(ops) if isinstance(x, t.Store) and x.value == _number(f, op.epoch) and x.at == row]
    yield op, bool(kept), f"{op.epoch.label} is not made of the rows' last epoch, and kept in its place"
    waited = any(isinstance(x, t.Barrier) for x in ops[ops.index(read[0]) : kept[0]])
    yield op, waited, "another thread may have the last epoch still to read when this one is kept; put a barrier between"
