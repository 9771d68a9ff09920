"""Programs that break the rule of packets between ranks."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_axis, with_ops, without

from moekit.compile import tile as t


def packets() -> tuple[t.TileProgram, list[t.Send], list[t.Receive]]:
    """A good program, what it sends and what it waits for."""
    program = good.exchange_program()
    return program, good.operations(program, t.Send), good.operations(program, t.Receive)


def in_order(program: t.TileProgram, ops: list[t.Op]) -> t.TileProgram:
    """The program with its packets, which follow each other but for loads, in another order."""
    at = min(i for i, op in enumerate(program.body) if isinstance(op, t.Packet))
    rest = [op for op in program.body if not isinstance(op, t.Packet | t.Load)]
    loads = [op for op in program.body if isinstance(op, t.Load)]
    first = [op for op in program.body[:at] if op in rest]
    begin = [op for op in loads if op in program.body[:at]]
    body = [op for op in program.body[:at] if op in first or op in begin]
    later = [op for op in program.body[at:] if op in rest]
    return replace(program, body=(*body, *(op for op in loads if op not in begin), *ops, *later))


@breaks("packets")
def send_in_a_loop():
    program, sends, _ = packets()
    again = replace(sends[0], out=t.Value(900, sends[0].out.dtype, sends[0].out.axes))
    loop = t.Loop((t.Value(901, "int32"),), (2,), (), (), (again,), (), ())
    at = program.body.index(sends[1])
    return replace(program, body=(*program.body[: at + 1], loop, *program.body[at + 1 :]))


@breaks("packets")
def wait_before_the_last_send():
    program, (first, second), (one, other) = packets()
    return in_order(program, [first, replace(one, own=(first.out, *one.own[1:])), second, other])


@breaks("packets")
def packets_of_another_epoch():
    program, sends, _ = packets()
    later = next(op.out for op in good.operations(program, t.Binary) if op.out.name == "later")
    return with_ops(program, t.Send, lambda op: op == sends[1], epoch=later)


@breaks("packets")
def wait_that_nothing_keeps_behind_a_send():
    program, sends, _ = packets()
    return with_ops(program, t.Receive, own=(sends[0].out, *sends[0].values[1:]))


@breaks("packets")
def rank_that_gets_nothing():
    program, (first, _), receives = packets()
    return in_order(program, [first, *(replace(op, own=(first.out, *op.own[1:])) for op in receives)])


@breaks("packets")
def rank_that_is_waited_for_twice():
    return with_ops(packets()[0], t.Receive, sender=1)


@breaks("packets")
def epoch_that_is_not_kept():
    program = packets()[0]
    later = next(op.out for op in good.operations(program, t.Binary) if op.out.name == "later")
    return with_ops(program, t.Store, lambda op: op.at.tensor == "tp_epochs", value=later)


@breaks("packets")
def epoch_kept_while_others_read_it():
    return without(packets()[0], lambda op: isinstance(op, t.Barrier))


@breaks("packets")
def epoch_that_is_no_rows():
    program = packets()[0]
    row = next(op.out for op in good.operations(program, t.Elements) if op.axis == "T")
    epochs = [op for op in good.operations(program, t.Store) if op.at.tensor == "tp_epochs"]
    changed = [replace(op, epoch=row) if isinstance(op, t.Packet) else replace(op, value=row) if op in epochs else op
               for op in program.body]  # fmt: skip
    return replace(program, body=tuple(changed))


@breaks("packets")
def packets_by_the_way_to_another_rank():
    program, sends, _ = packets()
    return with_ops(program, t.Send, way=sends[1].way)


@breaks("packets")
def accesses_of_other_elements_than_other_ranks_have():
    program = packets()[0]
    params = tuple(replace(p, dtype="bfloat16") if p.name == "tp_mail" else p for p in program.params)
    return replace(program, params=params)


@breaks("packets")
def fewer_accesses_than_a_row_has():
    return with_axis(packets()[0], "H.packets", extent=24)


@breaks("packets")
def another_word_to_one_rank():
    program, (first, second), receives = packets()
    return in_order(program, [first, replace(second, values=(second.values[0],) * 2), *receives])


@breaks("packets")
def own_part_that_was_not_sent():
    program, sends, receives = packets()
    return in_order(program, [*sends, *(replace(op, own=(op.own[0],) * 2) for op in receives)])


@breaks("packets")
def packets_one_by_one():
    program, sends, _ = packets()
    return with_ops(program, t.Send, values=sends[0].values[:1])


@breaks("types")
def neighbours_that_are_not_all_there():
    return with_axis(packets()[0], "H.packets", block=64)


@breaks("types")
def more_that_comes_than_was_sent():
    program, _, receives = packets()
    return with_ops(program, t.Receive, own=receives[0].own[:1])
