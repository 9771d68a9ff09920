"""Programs that break a rule of memory: masks, offsets, the order of loads and stores."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_ops, without

from moekit.compile import tile as t


def masks(op, *masks: t.Value) -> t.Access:
    """The access of an operation behind other masks."""
    return replace(op.at, mask=masks)


def narrow(op) -> t.Access:
    """The access of an operation with offsets in 32 bits."""
    return replace(op.at, wide=tuple(False for _ in op.at.wide))


def bound(program: t.TileProgram, axis: str) -> t.Value:
    """The mask of an axis."""
    return next(op.out for op in good.operations(program, t.InBounds) if op.axis == axis)


@breaks("memory_masked")
def pairs_without_the_mask_of_their_columns():
    program = good.tall_program()
    load = next(op for op in good.operations(program, t.Load) if "I.twice" in op.out.axes)
    return with_ops(program, t.Load, lambda op: op == load, at=masks(load))


@breaks("memory_masked")
def every_second_element_past_the_end():
    load = next(op for op in good.operations(good.norm_program(), t.Load) if op.at.tensor == "x")
    (columns,) = load.at.index[1].values
    at = replace(load.at, index=(load.at.index[0], t.Index.of(columns, step=2)))
    return with_ops(good.norm_program(), t.Load, lambda op: op == load, at=at)


@breaks("memory_masked")
def index_of_two_terms_that_leaves_its_axis():
    load = next(op for op in good.operations(good.norm_program(), t.Load) if op.at.tensor == "x")
    rows, columns = load.at.index[0].values[0], load.at.index[1].values[0]
    at = replace(load.at, index=(load.at.index[0], t.Index(((columns, 1), (rows, 1)))))
    return with_ops(good.norm_program(), t.Load, lambda op: op == load, at=at)


@breaks("memory_masked")
def index_that_is_data():
    program = good.norm_program()
    rows = next(op.out for op in good.operations(program, t.Elements) if op.axis == "T")
    square = t.Binary(t.Value(900, "int32", rows.axes), "mul", rows, rows)
    load = next(op for op in program.body if isinstance(op, t.Load) and op.at.tensor == "x")
    moved = replace(load, at=replace(load.at, index=(t.Index.of(square.out), load.at.index[1])))
    at = program.body.index(load)
    return replace(program, body=(*program.body[:at], square, moved, *program.body[at + 1 :]))


@breaks("memory_masked")
def load_without_a_mask():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, at=masks(op))


@breaks("memory_masked")
def store_without_a_mask():
    op = good.operations(good.norm_program(), t.Store)[0]
    return with_ops(good.norm_program(), t.Store, at=masks(op))


@breaks("memory_masked")
def store_masked_by_one_axis_of_two():
    program = good.norm_program()
    return with_ops(program, t.Store, at=masks(good.operations(program, t.Store)[0], bound(program, "T")))


@breaks("memory_masked")
def load_in_a_loop_without_its_mask():
    program = good.looped_program()
    load = next(op for op in good.operations(program, t.Load) if op.at.tensor == "x")
    return with_ops(program, t.Load, lambda op: op == load, at=masks(load, bound(program, "T")))


@breaks("memory_masked")
def mask_of_either_axis():
    program = good.norm_program()
    load = next(op for op in program.body if isinstance(op, t.Load) and op.at.tensor == "x")
    either = t.Binary(t.Value(900, "bool", load.out.axes), "or", bound(program, "T"), bound(program, "H"))
    at, masked = program.body.index(load), replace(load, at=masks(load, either.out))
    return replace(program, body=(*program.body[:at], either, masked, *program.body[at + 1 :]))


@breaks("memory_masked")
def gather_that_is_not_range_checked():
    program = good.lookup_program()
    load = next(op for op in good.operations(program, t.Load) if op.at.tensor == "table")
    return with_ops(program, t.Load, lambda op: op == load, at=masks(load, bound(program, "T"), bound(program, "H")))


@breaks("memory_masked")
def gather_that_accepts_negative_ids():
    return with_ops(good.lookup_program(), t.InBounds, lambda op: op.signed, signed=False)


@breaks("memory_masked")
def gather_in_the_range_of_another_axis():
    return with_ops(good.lookup_program(), t.InBounds, lambda op: op.signed, axis="H")


@breaks("memory_masked")
def update_that_is_not_range_checked():
    program = good.accumulate_program()
    store = next(op for op in good.operations(program, t.Store) if op.at.tensor == "state")
    return with_ops(program, t.Store, lambda op: op == store, at=masks(store, bound(program, "H")))


@breaks("memory_masked")
def prefetch_past_the_last_row():
    op = good.operations(good.ahead_program(), t.Prefetch)[0]
    return with_ops(good.ahead_program(), t.Prefetch, at=masks(op))


@breaks("wide_offsets")
def narrow_offset_along_a_dynamic_axis():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, at=narrow(op))


@breaks("wide_offsets")
def narrow_offset_of_a_store():
    op = good.operations(good.norm_program(), t.Store)[0]
    return with_ops(good.norm_program(), t.Store, at=narrow(op))


@breaks("wide_offsets")
def offset_of_which_nothing_is_said():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, at=replace(op.at, wide=()))


@breaks("wide_offsets")
def narrow_offset_of_a_huge_tensor():
    program = good.norm_program()
    params = tuple(replace(p, layout=replace(p.layout, wide=True)) for p in program.params)
    return replace(program, params=params)


@breaks("wide_offsets")
def narrow_offset_of_a_gather():
    program = good.accumulate_program()
    op = next(x for x in good.operations(program, t.Load) if x.at.tensor == "state")
    return with_ops(program, t.Load, lambda x: x == op, at=narrow(op))


@breaks("wide_offsets")
def prefetch_in_32_bits():
    program = good.ahead_program(wide=True)
    return with_ops(program, t.Prefetch, at=narrow(good.operations(program, t.Prefetch)[0]))


@breaks("stores_last")
def load_of_what_was_stored():
    program = good.accumulate_program()
    load = next(op for op in good.operations(program, t.Load) if op.at.tensor == "state")
    return replace(program, body=(*program.body, replace(load, out=replace(load.out, number=900))))


@breaks("stores_last")
def output_stored_twice():
    program = good.norm_program()
    return replace(program, body=(*program.body, program.body[-1]))


@breaks("stores_last")
def store_that_another_lane_may_see_too_early():
    return without(good.window_program(), lambda op: isinstance(op, t.Barrier))


@breaks("stores_last")
def load_after_the_barrier():
    program = good.window_program()
    barrier = next(op for op in program.body if isinstance(op, t.Barrier))
    at = 1 + next(i for i, op in enumerate(program.body) if isinstance(op, t.Elements) and op.axis == "H")
    rest = (*program.body[:at], *(op for op in program.body[at:] if op is not barrier))
    return replace(program, body=(*rest[:at], barrier, *rest[at:]))


@breaks("stores_last")
def elements_that_another_program_stores():
    program = good.window_program()
    rows = next(op.out for op in program.body if isinstance(op, t.Elements) and op.axis == "T")
    load = next(op for op in good.operations(program, t.Load) if op.at.tensor == "state")
    other = t.Binary(t.Value(900, "int32", rows.axes), "xor", rows, rows)
    valid = t.InBounds(t.Value(901, "bool", rows.axes), other.out, "T", signed=True)
    at = replace(load.at, index=(t.Index.of(other.out), *load.at.index[1:]), mask=(*load.at.mask, valid.out))
    place = program.body.index(load)
    return replace(program, body=(*program.body[:place], other, valid, replace(load, at=at), *program.body[place + 1 :]))


@breaks("hints_first")
def prefetch_after_a_store():
    program = good.ahead_program()
    hint = good.operations(program, t.Prefetch)[0]
    return replace(program, body=(*(op for op in program.body if op is not hint), hint))


@breaks("hints_first")
def prefetch_in_a_loop():
    program = good.ahead_program()
    hint = good.operations(program, t.Prefetch)[0]
    loop = next(op for op in program.body if isinstance(op, t.Loop))
    moved = replace(loop, body=(hint, *loop.body))
    return replace(program, body=tuple(moved if op is loop else op for op in program.body if op is not hint))


@breaks("hints_first")
def prefetch_of_what_is_written():
    program = good.ahead_program()
    params = tuple(replace(p, role="InOut") if p.name == "packed" else p for p in program.params)
    return replace(program, params=params)


@breaks("outputs_written")
def output_never_stored():
    return without(good.norm_program(), lambda op: isinstance(op, t.Store))


@breaks("outputs_written")
def store_to_an_input():
    program = good.norm_program()
    params = tuple(replace(p, role="In") for p in program.params)
    return replace(program, params=params)


@breaks("outputs_written")
def every_program_stores_the_same_row():
    program = good.norm_program("tile:T:1 whole:H:64")
    op = good.operations(program, t.Store)[0]
    return with_ops(program, t.Store, at=replace(op.at, index=(t.Index(), op.at.index[1])))


@breaks("outputs_written")
def first_column_only():
    program = good.norm_program("tile:T:4 loop:H:1")
    op = good.operations(program, t.Store)[0]
    return with_ops(program, t.Store, at=replace(op.at, index=(op.at.index[0], t.Index())))
