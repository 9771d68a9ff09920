"""Programs that break a rule of memory: masks, offsets, the order of loads and stores."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_ops, without

from moekit.compile import tile as t


@breaks("memory_masked")
def twins_without_the_mask_of_their_columns():
    program = good.tall_program()
    loads = [op for op in good.operations(program, t.Load) if "I.twice" in op.out.axes]
    return with_ops(program, t.Load, lambda op: op == loads[0], mask=None)


@breaks("memory_masked")
def twins_that_begin_at_data():
    program = good.tall_program()
    sides = good.operations(program, t.Sides)[0]
    return with_ops(program, t.Binary, lambda op: op.right == sides.out, op="mul")


@breaks("memory_masked")
def load_without_a_mask():
    return with_ops(good.norm_program(), t.Load, mask=None)


@breaks("memory_masked")
def store_without_a_mask():
    return with_ops(good.norm_program(), t.Store, mask=None)


@breaks("memory_masked")
def store_masked_by_one_axis_of_two():
    program = good.norm_program()
    rows = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "T")
    return with_ops(program, t.Store, mask=rows)


@breaks("memory_masked")
def load_in_a_loop_without_its_mask():
    program = good.looped_program()
    rows = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "T")
    return with_ops(program, t.Load, lambda op: op.tensor == "x", mask=rows)


@breaks("memory_masked")
def mask_of_either_axis():
    program = good.norm_program()
    return with_ops(program, t.Binary, lambda op: op.op == "and", op="or")


@breaks("memory_masked")
def gather_that_is_not_range_checked():
    program = good.lookup_program()
    load = next(op for op in good.operations(program, t.Load) if op.tensor == "table")
    rows = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "T")
    columns = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "H")
    both = t.Binary(t.Value("both", "bool", ("H", "T")), "and", rows, columns)
    at = program.body.index(load)
    body = (*program.body[:at], both, replace(load, mask=both.out, out=load.out), *program.body[at + 1 :])
    return replace(program, body=body)


@breaks("memory_masked")
def gather_that_accepts_negative_ids():
    program = good.lookup_program()
    low = next(op for op in good.operations(program, t.Binary) if op.op == "ge")
    high = next(op for op in good.operations(program, t.InBounds) if op.axis == "E")
    return with_ops(program, t.Binary, lambda op: op.op == "and" and op.left == low.out, left=high.out)


@breaks("memory_masked")
def update_that_is_not_range_checked():
    program = good.accumulate_program()
    columns = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "H")
    return with_ops(program, t.Store, lambda op: op.tensor == "state", mask=columns)


@breaks("memory_masked")
def prefetch_past_the_last_row():
    return with_ops(good.ahead_program(), t.Prefetch, mask=None)


@breaks("wide_offsets")
def narrow_offset_along_a_dynamic_axis():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, wide=tuple(False for _ in op.wide))


@breaks("wide_offsets")
def narrow_offset_of_a_store():
    op = good.operations(good.norm_program(), t.Store)[0]
    return with_ops(good.norm_program(), t.Store, wide=tuple(False for _ in op.wide))


@breaks("wide_offsets")
def narrow_offset_of_a_huge_tensor():
    program = good.norm_program()
    params = tuple(replace(p, layout=replace(p.layout, wide=True)) for p in program.params)
    return replace(program, params=params)


@breaks("wide_offsets")
def narrow_offset_of_a_gather():
    program = good.accumulate_program()
    op = next(x for x in good.operations(program, t.Load) if x.tensor == "state")
    return with_ops(program, t.Load, lambda x: x == op, wide=(False, False))


@breaks("wide_offsets")
def prefetch_in_32_bits():
    return with_ops(good.ahead_program(wide=True), t.Prefetch, wide=(False, False))


@breaks("stores_last")
def load_of_what_was_stored():
    program = good.accumulate_program()
    load = next(op for op in good.operations(program, t.Load) if op.tensor == "state")
    return replace(program, body=(*program.body, replace(load, out=replace(load.out, name="again"))))


@breaks("stores_last")
def output_stored_twice():
    program = good.norm_program()
    return replace(program, body=(*program.body, program.body[-1]))


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
    return with_ops(program, t.Store, index=(None, op.index[1]))


@breaks("outputs_written")
def first_column_only():
    program = good.norm_program("tile:T:4 loop:H:1")
    op = good.operations(program, t.Store)[0]
    return with_ops(program, t.Store, index=(op.index[0], None))
