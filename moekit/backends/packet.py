"""A packet on NVIDIA GPUs, in PTX: 32 bits of data and an epoch, written and read as one word of memory.

Both backends print this text. A packet is one scalar access of 64 bits, relaxed, at system scope: what sees the epoch sees the
data (two accesses of 32 bits are not promised to be one). Two packets go in a vector access, which is two such accesses and no
more, in any order: each has its own epoch, so that no more is needed. A compiler may take the text for a function of its
operands, so each has all that it depends on among them: a receive has what was sent, and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moekit.compile.tile.layouts import pitch
from moekit.compile.tile.ranks import SLOTS

BYTES = 8  # of a packet
LOOKS = 1023  # turns of a wait, less one, between looks at whether another wait has given up: of a power of two

TOGETHER = (1, 2, 4)  # accesses that a lane waits for at once, by how many it has


class Assembly(NamedTuple):
    """Text for a GPU, and the constraints of its results and operands."""

    text: str
    operands: str


def send(words: int) -> Assembly:
    """The text of an access that sends so many packets.

    Result: the first packet's data. Operands: each packet's data, address, epoch, whether there are any.
    """
    packets, (*data, at, epoch, there) = _each("packet", words), _operands(1, words + 3)
    lines = ["{", f".reg .pred there; .reg .b64 {', '.join(packets)};", f"setp.ne.s32 there, {there}, 0;"]
    lines += [f"mov.b64 {p}, {{{x}, {epoch}}};" for p, x in zip(packets, data, strict=True)]
    lines += [f"@there st.relaxed.sys.global{_shape(words)} [{at}], {_listed(packets)};"]
    return _assembly([*lines, f"mov.b32 $0, {data[0]};"], "=r", *"r" * words, *"lrr")


def receive(words: int, together: int) -> Assembly:
    """The text of a wait for so many accesses of so many packets, each wherever it is, whose loads are on their way at the same
    time.

    Results: of each access its packets' data, the first one's lowest. Operands, of each as many as accesses: data that was
    sent, packet by packet, which is the result where there is none; addresses, epochs, whether there is one, address of the
    word of errors, most turns, the sender's number from 1 on. The word of errors is the epoch that was waited for and the
    sender, of the first wait in vain: those after it follow from it, and do not look for long.
    """
    every = range(together)
    given = _operands(together, (words + 6) * together)
    *own, at, epoch, there, errors, most, sender = (given[k * together :][:together] for k in range(words + 6))
    lines = ["{", ".reg .pred look, more, other; .reg .b32 left, low;"]
    for i in every:
        lines += [f".reg .pred wait{i}; .reg .b64 {', '.join(_each(f'packet{i}_', words))};"]
        lines += [f".reg .b32 {', '.join(_each(f'data{i}_', words) + _each(f'epoch{i}_', words))};"]
        lines += [f"setp.ne.s32 wait{i}, {there[i]}, 0;"]
        lines += [f"mov.b32 data{i}_{w}, {own[w][i]};" for w in range(words)]
    lines += [f"cvt.u32.u64 left, {most[0]};", "POLL:"]
    lines += [
        f"@wait{i} ld.relaxed.sys.global{_shape(words)} {_listed(_each(f'packet{i}_', words))}, [{at[i]}];" for i in every
    ]
    lines += [f"@wait{i} mov.b64 {{data{i}_{w}, epoch{i}_{w}}}, packet{i}_{w};" for i in every for w in range(words)]
    for i in every:
        lines += [f"@wait{i} setp.ne.s32 other, epoch{i}_1, {epoch[i]};"] if words > 1 else []
        lines += [f"@wait{i} setp.ne{'.or' * (words > 1)}.s32 wait{i}, epoch{i}_0, {epoch[i]}{', other' * (words > 1)};"]
    lines += ["mov.pred more, wait0;", *(f"or.pred more, more, wait{i};" for i in every if i)]
    lines += _looked(errors[0])
    for i in every:
        lines += [f"@wait{i} mov.b64 packet{i}_0, {{{epoch[i]}, {sender[i]}}};"]
        lines += [f"@wait{i} atom.relaxed.sys.global.cas.b64 packet{i}_0, [{errors[i]}], 0, packet{i}_0;"]
    lines += [f"mov.b{32 * words} ${i}, {_listed(_each(f'data{i}_', words))};" for i in every]
    results = ["=l" if words == 2 else "=r"] * together
    return _assembly(lines, *results, *(kind for kind in "r" * words + "lrrllr" for _ in every))


def _assembly(lines: Sequence[str], *operands: str) -> Assembly:
    return Assembly("\n".join([*lines, "}"]), ",".join(operands))


def _looked(errors: str) -> list[str]:
    """The end of a turn of a wait: another one, unless it was the last or another wait has given up."""
    lines = ["sub.u32 left, left, 1;", f"and.b32 low, left, {LOOKS};", "setp.eq.and.u32 look, low, 0, more;"]
    lines += [f"@look ld.relaxed.sys.global.b32 low, [{errors}];"]
    lines += ["@look setp.ne.u32 look, low, 0;", "@look mov.b32 left, 0;"]
    return [*lines, "setp.ne.and.u32 more, left, 0, more;", "@more bra POLL;"]


def _each(name: str, n: int) -> list[str]:
    return [f"{name}{i}" for i in range(n)]


def _operands(first: int, n: int) -> list[str]:
    return [f"${first + i}" for i in range(n)]


def _shape(words: int) -> str:
    """How an access says that it is of so many packets."""
    return ".v2.b64" if words == 2 else ".b64"


def _listed(packets: Sequence[str]) -> str:
    return f"{{{', '.join(packets)}}}" if len(packets) > 1 else packets[0]


def addresses(at: Sequence[int], me: int, region: int, looks: int) -> list[int]:
    """What rank `me` reaches, as `tile.Ways` has it: mailboxes at `at`, with `region` bytes for each sender, and the word of
    errors behind them; a wait looks so many times."""
    ranks, away = len(at), [other != me for other in range(len(at))]
    to = [away[other] * (base + me * region) for other, base in enumerate(at)]
    own = [away[other] * (at[me] + other * region) for other in range(ranks)]
    return [*to, *own, at[me] + ranks * region, looks]


def region(rows: int, width: int) -> int:
    """Bytes of a mailbox for what one rank sends: two slots for each of so many rows of so many elements."""
    return rows * SLOTS * pitch(width) * BYTES


def literal(text: str) -> str:
    """The text as one string of Python within a function, a line of it on each line."""
    return "(\n" + "".join(f'        "{line} "\n' for line in text.splitlines()) + "    )"
