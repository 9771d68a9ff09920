"""Where kernels send and receive packets: calls of the helpers (`packet_helpers.py`), alike in the text of each backend."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from moekit.backends import packet
from moekit.backends.printer import Printer
from moekit.compile import tile as t
from moekit.compile.tile.layouts import pitch


def _send(p: Printer, op: t.Send) -> str:
    return _call(p, f"send_{op.words}", *_place(p, op), *map(p.text, op.values))


def _receive(p: Printer, op: t.Receive) -> str:
    late = (p.text(op.errors), p.text(op.most), str(op.sender))
    return _call(p, f"receive_{op.words}x{_together(p, op)}", *_place(p, op), *late, *map(p.text, op.own))


def _call(p: Printer, helper: str, *args: str) -> str:
    p.helpers |= {*p.basic, helper}
    return f"{helper}({', '.join(args)})"


def _place(p: Printer, op: t.Packet) -> tuple[str, ...]:
    """Where packets are: by what way, of which row, epoch and column, of how many columns, and which of them there are."""
    axes, mail = p.program.ordered(op.at.axes), p.program.param(op.at.tensor)
    row, *others = (p.at(i.values[0], axes) for i in op.at.index)
    column = others[0] if others else "0"
    for axis, text in zip(mail.axes[2:], others[1:], strict=True):
        column = f"({column}) * {p.program.axis(axis or '').extent} + {text}"
    columns = pitch(mail.mailbox.width) // op.words
    mask = p.mask(op.at, axes)
    there = p.word("there", mask) if mask else p.word("everywhere", p.shape(axes))
    return p.text(op.way), row, p.at(op.epoch, axes), column, str(columns), there


def _together(p: Printer, op: t.Receive) -> int:
    """How many accesses a lane waits for at once: as many as it has, if that is few."""
    lanes = prod(p.program.block(p.program.ordered(op.at.axes))) // (32 * p.program.warps)
    return max(n for n in packet.TOGETHER if n <= max(1, lanes))


PACKETS: dict[type, Callable[[Any, Any], str]] = {t.Send: _send, t.Receive: _receive}
