"""A packet on NVIDIA GPUs, in PTX: the bits of an element and an epoch, written and read as one word of memory.

Both backends print this text. One scalar access of 64 bits, relaxed, at system scope: what sees the epoch sees the data (two
accesses of 32 bits, or a vector access of two, are not promised to be one). A compiler may take the text for a function of its
operands, so each has all that it depends on among them: a receive has what was sent, and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

BYTES = 8  # of a packet
LOOKS = 1023  # turns of a wait, less one, between looks at whether another wait has given up: of a power of two

#: $0 value · $1 value, $2 address, $3 epoch, $4 whether there is one
SEND = """{
.reg .pred there; .reg .b64 packet;
setp.ne.s32 there, $4, 0;
mov.b64 packet, {$1, $3};
@there st.relaxed.sys.global.b64 [$2], packet;
mov.b32 $0, $1;
}"""
SEND_OPERANDS = "=r,r,l,r,r"

TOGETHER = 4  # packets that a lane waits for at once


def receive(together: int) -> str:
    """The text of a wait for so many packets, each wherever it is, whose loads are on their way at the same time.

    Results: their values, 0 where there is none. Operands, of each as many: what was sent, addresses, epochs, whether there is
    one, address of the word of errors, most turns, the sender's number from 1 on. The word of errors is the epoch that was
    waited for and the sender, of the first wait in vain: those after it follow from it, and do not look for long.
    """
    every = range(together)
    _, _, at, epoch, there, errors, most, sender = ([f"${k * together + i}" for i in every] for k in range(8))
    lines = ["{"]
    lines += [f".reg .pred wait{i}; .reg .b32 data{i}, epoch{i}; .reg .b64 packet{i};" for i in every]
    lines += [".reg .pred look, more; .reg .b32 left, low;"]
    lines += [f"setp.ne.s32 wait{i}, {there[i]}, 0; mov.b32 data{i}, 0;" for i in every]
    lines += [f"cvt.u32.u64 left, {most[0]};", "POLL:"]
    lines += [f"@wait{i} ld.relaxed.sys.global.b64 packet{i}, [{at[i]}];" for i in every]
    lines += [f"@wait{i} mov.b64 {{data{i}, epoch{i}}}, packet{i};" for i in every]
    lines += [f"@wait{i} setp.ne.s32 wait{i}, epoch{i}, {epoch[i]};" for i in every]
    lines += ["mov.pred more, wait0;", *(f"or.pred more, more, wait{i};" for i in every if i)]
    lines += ["sub.u32 left, left, 1;", f"and.b32 low, left, {LOOKS};", "setp.eq.and.u32 look, low, 0, more;"]
    lines += [f"@look ld.relaxed.sys.global.b32 low, [{errors[0]}];"]
    lines += ["@look setp.ne.u32 look, low, 0;", "@look mov.b32 left, 0;"]
    lines += ["setp.ne.and.u32 more, left, 0, more;", "@more bra POLL;"]
    lines += [f"@wait{i} mov.b64 packet{i}, {{{epoch[i]}, {sender[i]}}};" for i in every]
    lines += [f"@wait{i} atom.relaxed.sys.global.cas.b64 packet{i}, [{errors[i]}], 0, packet{i};" for i in every]
    lines += [f"mov.b32 ${i}, data{i};" for i in every]
    return "\n".join([*lines, "}"])


def receive_operands(together: int) -> str:
    """The constraints of its results and operands."""
    return ",".join(["=r"] * together + [kind for kind in "rlrrllr" for _ in range(together)])


def addresses(at: Sequence[int], me: int, region: int, looks: int) -> list[int]:
    """What rank `me` reaches, as `tile.Ways` has it: mailboxes begin at `at`, with `region` bytes for each sender and the word
    of errors behind them; a wait looks so many times."""
    ranks = len(at)
    to, own = [base + me * region for base in at], [at[me] + other * region for other in range(ranks)]
    return [*to, *own, at[me] + ranks * region, looks]


def literal(text: str, depth: int) -> str:
    """The text as one string of Python, a line of it on each line."""
    pad = "    " * depth
    return "(\n" + "".join(f'{pad}    "{line} "\n' for line in text.splitlines()) + f"{pad})"
