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

#: $0 value, 0 where there is none · $1 what was sent, $2 address, $3 epoch, $4 whether there is one, $5 address of the word of
#: errors, $6 most turns, $7 the sender's number from 1 on. The word of errors is the epoch that was waited for and the sender;
#: the first may be there already, and then nobody waits long.
RECEIVE = f"""{{
.reg .pred wait, look, more; .reg .b32 data, epoch, left, low; .reg .b64 packet;
setp.ne.s32 wait, $4, 0;
mov.b32 data, 0;
cvt.u32.u64 left, $6;
POLL:
@wait ld.relaxed.sys.global.b64 packet, [$2];
@wait mov.b64 {{data, epoch}}, packet;
@wait setp.ne.s32 wait, epoch, $3;
sub.u32 left, left, 1;
and.b32 low, left, {LOOKS};
setp.eq.and.u32 look, low, 0, wait;
@look ld.relaxed.sys.global.b32 low, [$5];
@look setp.ne.u32 look, low, 0;
@look mov.b32 left, 0;
setp.ne.and.u32 more, left, 0, wait;
@more bra POLL;
@wait mov.b64 packet, {{$3, $7}};
@wait st.relaxed.sys.global.b64 [$5], packet;
mov.b32 $0, data;
}}"""
RECEIVE_OPERANDS = "=r,r,l,r,r,l,l,r"


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
