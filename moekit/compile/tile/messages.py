"""The rule of packets between ranks: what the argument that they are sound needs (docs/collectives.md)."""

from __future__ import annotations

from collections.abc import Iterator

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, depends
from moekit.compile.tile.layouts import PAIR, carried

Claims = Iterator[tuple[t.Op | None, bool, str]]


def packets(f: Facts) -> Claims:
    """A program sends whole rows of its own to every rank once, before it waits for anyone's; then it keeps the rows' epoch."""
    found = [(op, around) for op, around in f.ops if isinstance(op, t.Packet)]
    sends = {op.peer: op for op, _ in found if isinstance(op, t.Send)}
    receives = [op for op, _ in found if isinstance(op, t.Receive)]
    for n, (op, around) in enumerate(found):
        param = f.program.param(op.at.tensor)
        everyone = list(range(param.mailbox.ranks))
        yield op, not around, "it is in a loop, whose turns would wait for each other's packets; put it outside"
        waits = isinstance(op, t.Send) and any(isinstance(x, t.Receive) for x, _ in found[:n])
        yield op, not waits, "it comes after a wait for other ranks, which wait for it; send everything first"
        alike = (op.at, op.epoch) == (found[0][0].at, found[0][0].epoch)
        yield op, alike, "its elements or epoch are not those of the program's other packets"
        for sent in sends.values():
            after = not isinstance(op, t.Receive) or any(depends(f, v, {sent.out}, set()) for v in op.own)
            yield op, after, f"nothing keeps it behind what is sent to rank {sent.peer}; let it read {sent.out.label}"
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
    fits = op.words == (PAIR if n > 1 else 1)
    yield op, fits, f"its accesses are of {op.words} packets, which are not those of other ranks"


def _epochs_kept(f: Facts, op: t.Packet) -> Claims:
    """An epoch is made of its rows' last one, and kept when every thread has read that."""
    read = [x for x in f.only(t.Load) if depends(f, op.epoch, {x.out}, set())]
    ops, row = [x for x, _ in f.ops], read[0].at if read else None
    kept = [n for n, x in enumerate(ops) if isinstance(x, t.Store) and x.value == op.epoch and x.at == row]
    yield op, bool(kept), f"{op.epoch.label} is not made of the rows' last epoch, and kept in its place"
    waited = any(isinstance(x, t.Barrier) for x in ops[ops.index(read[0]) : kept[0]])
    yield op, waited, "another thread may have the last epoch still to read when this one is kept; put a barrier between"
