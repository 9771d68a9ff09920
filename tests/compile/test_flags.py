"""Rows that go to other ranks as they are, with a flag behind each: played, and gone through in a model of a memory in which
what one rank stores may reach another in any order that a release does not forbid."""

from dataclasses import replace
from itertools import product

import pytest

from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile.facts import facts_of
from moekit.compile.tile.layouts import contiguous
from moekit.compile.tile.verify import check, verify
from moekit.errors import ScheduleError, VerifyError
from moekit.lang.dtypes import FLOATS

from .test_exchange import Played, bound, lowered

BY_ROW = "tile:T:1 whole:H:512 flags:tp warps:2"
IN_ROUNDS = f"{BY_ROW} rounds:T:2"
WIDE = 500


@pytest.mark.parametrize("schedule", [BY_ROW, IN_ROUNDS])
@pytest.mark.parametrize(
    ("ranks", "dtype"), [*((2, dtype) for dtype in FLOATS), (3, "bfloat16"), (4, "float32"), (8, "float16")]
)
def test_ranks_have_the_sum_in_their_order(ranks, dtype, schedule):
    """Whatever comes first, for numbers of rows that change from call to call, with fewer and with more rows than programs."""
    Played(ranks, WIDE, (1, 5, 0, 2), dtype, seed=ranks, schedule=schedule).hold()


def test_packets_in_rounds():
    """Programs take rows in turn where these are packets, too."""
    for seed in range(4):
        Played(2, 20, (7, 1, 9, 3), seed=seed, schedule="tile:T:1 whole:H:32 rounds:T:2").hold()


@pytest.mark.parametrize("begin", [-3, -2, -1, 2**31 - 2])
def test_epochs_go_round(begin):
    """The flag of no row is that of another epoch."""
    played = Played(2, WIDE, (3,) * 5, begin=begin, schedule=IN_ROUNDS)
    played.hold()
    assert all((e[:3] != 0).all() for e in played.epochs)


def test_bits_are_those_of_packets():
    """How a row goes does not change what it is, nor which program has it."""
    one, other, third = (
        Played(3, WIDE, (4,), "bfloat16", schedule=s) for s in (BY_ROW, IN_ROUNDS, "tile:T:1 whole:H:512 warps:2")
    )
    for played in (other, third):
        for mine, same in zip(one.memories, played.memories, strict=True):
            assert mine[0]["out"].tobytes() == same[0]["out"].tobytes()


def seen(made, slots: int = 2, ranks: int = 2, tries: int = 30) -> str:
    """What goes wrong with a plan in some interleaving."""
    for seed in range(tries):
        try:
            Played(ranks, WIDE, (2, 2, 2), seed=seed, slots=slots, made=made).hold()
        except (IndexError, AssertionError) as error:
            return str(error)
    return ""


def changed(made, change):
    """A plan with the operations that a program does for a row, in its loop or not, replaced by what `change` makes of them."""
    (program,) = made.programs

    def body(ops):
        return tuple(replace(op, body=body(op.body)) if isinstance(op, t.Loop) else op for op in change(list(ops)))

    return replace(made, programs=(replace(program, body=body(program.body)),))


def flag_first(ops: list[t.Op]) -> list[t.Op]:
    """The flag goes up before the row is sent: it waits for a maximum of what is yet to be."""
    if not (sends := [op for op in ops if isinstance(op, t.Send)]):
        return ops
    gathered = next(op for op in ops if isinstance(op, t.Reduce) and op.out.name == "all_sent")
    early = [replace(gathered, value=sends[0].values[0]), *(op for op in ops if isinstance(op, t.Raise))]
    rest = [op for op in ops if op != gathered and op not in early]
    at = rest.index(sends[0])
    return [*rest[:at], *early, *rest[at:]]


def no_fence(ops: list[t.Op]) -> list[t.Op]:
    """The flag goes up after this thread's own stores, whatever other lanes have sent."""
    epoch = next((op.epoch for op in ops if isinstance(op, t.Send)), None)
    return [replace(op, after=epoch) if isinstance(op, t.Raise) else op for op in ops]


def wrong_slot(ops: list[t.Op]) -> list[t.Op]:
    """Every flag goes up at the first rank."""
    ways = [op.way for op in ops if isinstance(op, t.Raise)]
    return [replace(op, way=ways[0]) if isinstance(op, t.Raise) else op for op in ops]


def one_peer(ops: list[t.Op]) -> list[t.Op]:
    """What a flag is behind is what went to the first rank, not to all."""
    first = next((op for op in ops if isinstance(op, t.Send)), None)
    return [
        replace(op, value=first.out) if isinstance(op, t.Reduce) and first and op.out.name == "all_sent" else op for op in ops
    ]


@pytest.mark.parametrize(("fault", "said"), [
    (flag_first, "takes a packet"), (no_fence, "takes a packet"), (wrong_slot, "wait for packets that nobody sends"),
    (one_peer, "takes a packet"),
])  # fmt: skip
@pytest.mark.parametrize("schedule", [BY_ROW, IN_ROUNDS])
def test_faults_are_seen(schedule, fault, said):
    """In some interleaving; and the rule of packets refuses each before anything runs."""
    made = lowered(3, WIDE, schedule=schedule)
    assert not seen(made, ranks=3, tries=6)
    assert said in seen(changed(made, fault), ranks=3)
    with pytest.raises(VerifyError, match="packets: "):
        check(facts_of(changed(made, fault).programs[0]), "packets")


def test_one_slot_is_too_few():
    """A rank may send for the next call what its peer has still to take for this one."""
    assert "overwrites a packet that rank" in seen(lowered(2, WIDE, schedule=IN_ROUNDS), slots=1)


def test_what_is_no_place_for_flags():
    """One flag stands for all lanes' stores, which a reduction over several warps has brought together."""
    for schedule, why in (
        ("tile:T:2 whole:H:512 flags:tp warps:2", "needs one row a program, not tile:T:2"),
        (
            "tile:T:1 whole:H:512 flags:tp warps:1",
            "needs two warps or more and an access a lane; rows have 128 accesses for 32",
        ),
        ("tile:T:1 whole:H:512 flags:tp warps:8", "rows have 128 accesses for 256 lanes"),
        ("tile:T:1 whole:H:512 flags:dp warps:2", "flags:dp names what no ranks add up over; they do over tp"),
    ):
        with pytest.raises(ScheduleError, match=why):
            lowered(2, WIDE, schedule=schedule)


# The model: what is sent may arrive at any time, but a flag that was raised behind it brings it along. Every order of steps and
# arrivals of each rank's rows is gone through, as the lowered program has them; each lane has a part of a row.


def steps_of(made, lanes: int) -> list[tuple]:
    """Of a row: what is sent, flags with the peers' sends that each is behind, waits and what is taken."""
    (program,) = made.programs
    ops = [op for op, _ in t.walk(program.body)]
    by = {v: op for op in ops for v in t.results(op)}

    def behind(value: t.Value) -> frozenset[int]:
        """The ranks of the sends that a maximum over lanes is made of."""
        found, left = set(), [value] if isinstance(by.get(value), t.Reduce) else []
        while left:
            op = by.get(left.pop())
            found |= {op.peer} if isinstance(op, t.Send) else set()
            left += t.operands(op) if op else []
        return frozenset(found)

    found: list[tuple] = []
    for op in ops:
        if isinstance(op, t.Send):
            found += [("send", op.peer, lane) for lane in range(lanes)]
        elif isinstance(op, t.Raise):
            found.append(("raise", op.peer, behind(op.after)))
        elif isinstance(op, t.Receive):
            found += [("wait", op.sender), *(("take", op.sender, lane) for lane in range(lanes))]
    return found


def model(made, ranks: int, rows: int, calls: int, slots: int, rounds: bool, lanes: int = 2) -> tuple[int, str]:
    """How many states can be reached, and the first thing that goes wrong in one of them.

    A state: how far each rank is, per row; what lies in mailboxes (receiver, sender, row, slot, lane or flag, epoch); what is
    on its way there; which of it has yet to be taken.
    """
    steps = steps_of(made, lanes)
    begin = ((0, (0,) * rows),) * ranks, frozenset(), frozenset(), frozenset()
    known, left = {begin}, [begin]
    while left:
        state = left.pop()
        following, wrong = successors(state, steps, rows, calls, slots, rounds)
        if wrong:
            return len(known), wrong
        if not following and any(call < calls for call, _ in state[0]):
            return len(known), "nobody can go on"
        new = [s for s in following if s not in known]
        known |= {*new}
        left += new
    return len(known), ""


def put(mail, packet):
    """A mailbox with what was there replaced."""
    return frozenset(p for p in mail if p[:5] != packet[:5]) | {packet}


def successors(state, steps, rows: int, calls: int, slots: int, rounds: bool):
    """Each program of each rank a step further, and each thing that is on its way arrived."""
    at, mail, way, unread = state
    found = [(at, put(mail, packet), way - {packet}, unread) for packet in way]
    for (rank, (call, done)), row in product(enumerate(at), range(rows)):
        if call == calls or done[row] == len(steps) or (rounds and any(n < len(steps) for n in done[:row])):
            continue
        kind, other, *more = steps[done[row]]
        epoch, now = call + 1, (mail, way, unread)
        if other == rank:
            pass
        elif kind == "send":
            packet = (other, rank, row, epoch % slots, more[0], epoch)
            if packet[:5] in {p[:5] for p in unread}:
                return [], f"call {call} of rank {rank} overwrites what rank {other} has not taken"
            now = mail, way | {packet}, unread | {packet}
        elif kind == "raise":
            brought = {p for p in way if p[1:4] == (rank, row, epoch % slots) and p[0] in more[0]}
            for packet in (*brought, (other, rank, row, epoch % slots, "flag", epoch)):
                now = put(now[0], packet), now[1] - {packet}, now[2]
        elif kind == "wait":
            if (rank, other, row, epoch % slots, "flag", epoch) not in mail:
                continue
        else:
            packet = (rank, other, row, epoch % slots, more[0], epoch)
            if packet not in mail:
                return [], f"call {call} of rank {rank} takes what is not there"
            now = mail, way, unread - {packet}
        further = (*done[:row], done[row] + 1, *done[row + 1 :])
        mine = (call + 1, (0,) * rows) if all(n == len(steps) for n in further) else (call, further)
        found.append(((*at[:rank], mine, *at[rank + 1 :]), *now))
    return found, ""


@pytest.mark.parametrize(
    ("ranks", "rows", "calls", "rounds", "lanes"),
    [(2, 1, 4, False, 2), (2, 2, 2, False, 1), (2, 2, 3, True, 1), (3, 1, 2, False, 1)],
)
def test_two_slots_and_a_release_suffice(ranks, rows, calls, rounds, lanes):
    """In every order of steps and arrivals: of one row, of two at once, of two by one program."""
    made = lowered(ranks, WIDE, schedule=IN_ROUNDS if rounds else BY_ROW)
    states, wrong = model(made, ranks, rows, calls, 2, rounds, lanes)
    assert not wrong
    assert states > 100


def test_the_model_sees_faults():
    """One slot, a flag before its row, one that no maximum brings lanes together for, one of another rank's row."""
    made = lowered(2, WIDE, schedule=BY_ROW)
    assert "overwrites" in model(made, 2, 1, 3, 1, False)[1]
    for fault in (flag_first, no_fence):
        assert "takes what is not there" in model(changed(made, fault), 2, 1, 2, 2, False)[1]


def test_a_later_row_first_locks():
    """Programs that take rows in the order that others do not take them in wait for each other: the rule asks for one order."""
    made = lowered(2, WIDE, schedule=IN_ROUNDS)
    (program,) = made.programs
    axes = tuple(replace(a, beside=0) if a.name == "T" else a for a in program.axes)
    with pytest.raises(VerifyError, match="is in a loop, whose turns would wait for each other's packets"):
        verify(replace(program, axes=axes, grid=()))


def test_sizes_are_of_any_call():
    """One plan serves every number of rows, and has no more programs than are said."""
    graph, sizes = bound(2, WIDE)
    (program,) = plan(graph, Schedule.parse(IN_ROUNDS), contiguous(graph, sizes)).programs
    assert [program.programs({"T": n}) for n in (1, 2, 9)] == [2, 2, 2]
