"""Packets between ranks: all ranks played with any interleaving, and a small model in which every one is gone through."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from moekit.backends.array import evaluate_ranks
from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile.interpret import poison
from moekit.compile.tile.layouts import carried, contiguous, pitch
from moekit.compile.tile.ranks import Mail, Mailboxes, play
from moekit.errors import ScheduleError
from moekit.fusions import FUSIONS
from moekit.lang import In, all_reduce, cast, f32, fusion, sum
from moekit.lang.dtypes import FLOATS, numpy_dtype

FUSION = FUSIONS["all_reduce_add_rms_norm"]
ROWS = 9  # that the mailboxes have room for


def bound(ranks: int, width: int, dtype: str = "float32", rows: int = 2):
    """The graph of one rank and its sizes."""
    shapes = {"partial": (rows, width), "residual": (rows, width), "weight": (width,)}
    binding = FUSION.bind(shapes, dict.fromkeys(shapes, dtype), FUSION.bind_params({"tp": ranks}))
    return FUSION.trace(binding), dict(binding.sizes)


def lowered(ranks: int, width: int, dtype: str = "float32", schedule: str | None = None):
    """The plan of one rank."""
    graph, sizes = bound(ranks, width, dtype)
    return plan(graph, Schedule.parse(schedule) if schedule else None, contiguous(graph, sizes))


def operands(rng: np.random.Generator, ranks: int, rows: int, width: int, dtype: str) -> list[dict[str, np.ndarray]]:
    """What every rank is called with: residual and weight are the same on all."""
    draw = lambda *shape: rng.standard_normal(shape).astype(numpy_dtype(dtype))  # noqa: E731
    residual, weight = draw(rows, width), draw(width)
    return [{"partial": draw(rows, width), "residual": residual.copy(), "weight": weight} for _ in range(ranks)]


class Played:
    """Calls of some ranks with the given numbers of rows, played once."""

    def __init__(
        self, ranks: int, width: int, rows: tuple[int, ...], dtype="float32", seed=0, begin=0, slots=2, made=None, schedule=None
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.graph, _ = bound(ranks, width, dtype)
        self.plan = made or lowered(ranks, width, dtype, schedule)
        self.epochs = [np.full(ROWS, begin, np.int32) for _ in range(ranks)]
        self.boxes = Mailboxes(ranks, (ROWS, pitch(width)), slots)
        mails = [Mail(self.boxes, r) for r in range(ranks)]
        self.sizes = [{"T": n, "H": width} for n in rows]
        self.given = [operands(rng, ranks, n, width, dtype) for n in rows]
        self.memories = [
            [{**{n: x.copy() for n, x in call[r].items()}, "out": poison(call[r]["partial"].shape, dtype),
              "tp_mail": mails[r], "tp_epochs": self.epochs[r]} for call in self.given]
            for r in range(ranks)
        ]  # fmt: skip
        play([self.plan] * len(rows), self.memories, self.sizes, Random(seed))

    def hold(self) -> None:
        """What came out is what array evaluation of all ranks has, the sum to the bit, and the same on all ranks."""
        for c, (call, size) in enumerate(zip(self.given, self.sizes, strict=True)):
            expected = evaluate_ranks(self.graph, call, size)
            for r, mine in enumerate(self.memories):
                np.testing.assert_array_equal(mine[c]["residual"], expected[r]["residual"])
                narrow = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[mine[c]["out"].dtype.name]
                got, wanted = (x.astype(np.float64) for x in (mine[c]["out"], expected[r]["out"]))
                np.testing.assert_allclose(got, wanted, rtol=narrow, atol=narrow)
                assert mine[c]["out"].tobytes() == self.memories[0][c]["out"].tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_have_the_sum_in_their_order(ranks, dtype):
    """Whatever comes first, for numbers of rows from none on that change from call to call."""
    for seed in range(3):
        Played(ranks, 20, (1, 5, 0, 2), dtype, seed).hold()


@pytest.mark.parametrize("schedule", ["tile:T:1 whole:H:32", "tile:T:4 whole:H:32", None])
def test_schedules(schedule):
    """One row a program and several; the last block has fewer."""
    Played(2, 20, (7, 3, 9), schedule=schedule).hold()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 33])
def test_widths(width, dtype):
    """Rows that accesses of several elements do not divide, and rows too short for one."""
    Played(2, width, (3, 1, 2), dtype).hold()


@pytest.mark.parametrize(("dtype", "width", "each"), [
    ("float32", 2048, 2), ("float32", 2, 1), ("float32", 3, 2), ("bfloat16", 2048, 4), ("float16", 257, 4), ("bfloat16", 4, 1),
])  # fmt: skip
def test_ranks_agree_how_many_elements_go_at_once(dtype, width, each):
    """It follows from dtype and width, not from a schedule, or from strides, which differ from rank to rank."""
    graph, sizes = bound(2, width, dtype)
    block = 1 << (width - 1).bit_length()
    dense, seen = contiguous(graph, sizes), set()
    loose = {n: replace(x, strides=("any",) * len(x.strides)) for n, x in dense.items()}
    for schedule in (None, f"tile:T:1 whole:H:{block}", f"tile:T:4 whole:H:{block} warps:1"):
        for layouts in (dense, loose):
            (program,) = plan(graph, Schedule.parse(schedule) if schedule else None, layouts).programs
            send = next(op for op in program.body if isinstance(op, t.Send))
            along = next(op for op in program.body if t.results(op) == (send.at.index[-1].alone,))
            seen.add((carried(program, program.param("tp_mail")), send.words, program.axis(along.axis).extent))
    assert seen == {(each, 2 if each > 1 else 1, -(-width // each))}


def strided(x: np.ndarray) -> np.ndarray:
    """The same numbers in memory where neither rows nor columns lie side by side."""
    held = np.full((*(2 * n for n in x.shape[::-1]),), np.nan, x.dtype)
    out = held[tuple(slice(None, None, 2) for _ in x.shape)].T
    out[...] = x
    return out


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype):
    """Operands and outputs of any strides, each rank's its own."""
    graph, sizes = bound(2, 20, dtype, rows=5)
    given = operands(np.random.default_rng(1), 2, 5, 20, dtype)
    boxes, memories = Mailboxes(2, (ROWS, 20)), []
    for r, mine in enumerate(given):
        here = {n: strided(x) if r else x.copy() for n, x in mine.items()}
        out = strided(poison((5, 20), dtype)) if r else poison((5, 20), dtype)
        memories.append([{**here, "out": out, "tp_mail": Mail(boxes, r), "tp_epochs": np.zeros(ROWS, np.int32)}])
    play([lowered(2, 20, dtype)], memories, [sizes], Random(0))
    expected = evaluate_ranks(graph, given, sizes)
    for r, (mine,) in enumerate(memories):
        np.testing.assert_array_equal(mine["residual"], expected[r]["residual"])
        np.testing.assert_array_equal(mine["out"], memories[0][0]["out"])


@pytest.mark.parametrize("begin", [-3, -2, -1, 2**31 - 2])
def test_epochs_go_round(begin):
    """Past the last epoch comes neither 0, which no packet has, nor a slot that is in use."""
    played = Played(2, 4, (3,) * 5, begin=begin)
    played.hold()
    assert all((e[:3] != 0).all() for e in played.epochs)
    assert all((e[3:] == begin).all() for e in played.epochs)  # a row that is in no call counts nothing


def seen(made, slots: int = 2, tries: int = 40, ranks: int = 2) -> str:
    """What goes wrong with a plan in some interleaving."""
    for seed in range(tries):
        try:
            Played(ranks, 4, (2, 2, 2), seed=seed, slots=slots, made=made).hold()
        except (IndexError, AssertionError) as error:
            return str(error)
    return ""


def changed(made, change):
    """A plan with every operation replaced by what `change` makes of it."""
    (program,) = made.programs
    return replace(made, programs=(replace(program, body=tuple(change(op) for op in program.body)),))


def test_one_slot_is_too_few():
    """A rank may send for the next call what its peer has still to receive for this one."""
    assert "overwrites a packet that rank" in seen(lowered(2, 4), slots=1)
    assert not seen(lowered(2, 4))


def test_faults_are_seen():
    """An epoch that stands still, packets of another rank, sums in another order."""
    made = lowered(3, 4)
    down = changed(made, lambda op: replace(op, op="sub") if isinstance(op, t.Binary) and op.out.name == "later" else op)
    assert not seen(down, ranks=3)  # which is counting, too
    one = next(op for op in made.programs[0].body if isinstance(op, t.Const) and (op.value, op.out.dtype) == (1, "int32"))
    assert seen(changed(made, lambda op: replace(op, value=0) if op == one else op), ranks=3)
    ways = next(op.outs for op in made.programs[0].body if isinstance(op, t.Ways))
    other = changed(made, lambda op: replace(op, way=ways[3]) if isinstance(op, t.Receive) and op.sender == 1 else op)
    assert "sent for call" in seen(other, ranks=3)
    elsewhere = changed(made, lambda op: replace(op, way=ways[0]) if isinstance(op, t.Send) and op.peer == 1 else op)
    assert seen(elsewhere, ranks=3)
    turned = changed(made, lambda op: replace(op, way=ways[5 - op.sender]) if isinstance(op, t.Receive) else op)
    assert seen(turned, ranks=3)


# The model: a rank's programs are the sends and receives of the lowered program, a row each; every interleaving is tried.


def model(made, ranks: int, rows: int, calls: int, slots: int) -> tuple[int, str]:
    """How many states can be reached, and the first thing that goes wrong in one of them."""
    (program,) = made.programs
    steps = [op for op in program.body if isinstance(op, t.Packet)]
    begin = ((0, (0,) * rows),) * ranks, frozenset()
    known, left = {begin}, [begin]
    while left:
        state = left.pop()
        following, wrong = successors(state, steps, rows, calls, slots)
        if wrong:
            return len(known), wrong
        if not following and any(call < calls for call, _ in state[0]):
            return len(known), "nobody can go on"
        new = [s for s in following if s not in known]
        known |= {*new}
        left += new
    return len(known), ""


def successors(state, steps, rows: int, calls: int, slots: int):
    """Each program of each rank a step further. A packet is (receiver, sender, row, slot, epoch), there until it is taken."""
    at, mail = state
    found = []
    for rank, (call, program) in enumerate(at):
        for row in range(rows) if call < calls else ():
            if program[row] == len(steps):
                continue
            op, epoch, now = steps[program[row]], call + 1, mail
            if rank == (op.peer if isinstance(op, t.Send) else op.sender):
                pass  # what is one's own goes nowhere
            elif isinstance(op, t.Send):
                place = (op.peer, rank, row, epoch % slots)
                if any(packet[:4] == place for packet in mail):
                    return [], f"call {call} of rank {rank} overwrites what rank {op.peer} has not received"
                now = mail | {(*place, epoch)}
            else:
                packet = (rank, op.sender, row, epoch % slots, epoch)
                if packet not in mail:
                    continue
                now = mail - {packet}
            further = (*program[:row], program[row] + 1, *program[row + 1 :])
            ended = all(n == len(steps) for n in further)
            mine = (call + 1, (0,) * rows) if ended else (call, further)
            found.append(((*at[:rank], mine, *at[rank + 1 :]), now))
    return found, ""


@pytest.mark.parametrize(("ranks", "rows", "calls"), [(2, 1, 4), (2, 2, 3), (3, 1, 3)])
def test_two_slots_suffice_and_one_does_not(ranks, rows, calls):
    """In every interleaving of 2 ranks with 1 and 2 rows, and of 3 ranks."""
    states, wrong = model(lowered(ranks, 4), ranks, rows, calls, slots=2)
    assert not wrong
    assert states > 100
    assert "overwrites" in model(lowered(ranks, 4), ranks, rows, calls, slots=1)[1]


def test_sends_behind_a_wait_lock():
    """What rule `packets` is for: each rank waits for the other's packet before it sends its own."""
    made = lowered(2, 4)
    (program,) = made.programs
    first, second, *others = [op for op in program.body if isinstance(op, t.Packet)]
    assert isinstance(second, t.Send)
    turned = replace(made, programs=(replace(program, body=(*others, first, second)),))
    assert model(turned, 2, 1, 2, 2)[1] == "nobody can go on"


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        ("tile:T:1 loop:H:8", "ranks add up its rows: it must be whole"),
        ("loop:T:1 whole:H:32", "ranks add up rows along T over tp, so it must be tiled, not loop:T:1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule, why):
    """A program sends whole rows, and has all of its rows at once."""
    with pytest.raises(ScheduleError, match=why):
        lowered(2, 20, schedule=schedule)


@fusion(mesh="tp", x=In("T H"), y=In("T H"))
def twice(x, y, tp: int = 2):
    """Two sums over ranks."""
    total = cast(all_reduce(x, over="tp"), "float32")
    return total * all_reduce(y * sum(total, over="H"), over="tp")


@fusion(mesh="tp", x=In("T H"), w=In("J"))
def spread_out(x, w, tp: int = 2):
    """An output along an axis that the sum has not."""
    return f32(all_reduce(x, over="tp")) * f32(w)


def test_declarations_that_no_program_can_serve_are_refused():
    """Two sums in a launch; programs that would send the same rows."""
    graph = twice.trace(twice.bind({"x": (2, 8), "y": (2, 8)}, dict.fromkeys("xy", "float32"), {"tp": 2}))
    with pytest.raises(ScheduleError, match="a launch adds up 2 values over tp, and may one; stage the first sum"):
        plan(graph, None, contiguous(graph, {"T": 2, "H": 8}))
    graph = spread_out.trace(spread_out.bind({"x": (2, 8), "w": (4096,)}, dict.fromkeys("xw", "float32"), {"tp": 2}))
    with pytest.raises(ScheduleError, match="programs along J would each send the same rows over tp"):
        plan(graph, None, contiguous(graph, {"T": 2, "H": 8, "J": 4096}))
