"""Hand-broken programs: for each rule of `moekit.compile.verify`, good programs with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import programs as good

from moekit.compile import tile as t

Breaker = Callable[[], t.TileProgram]
BREAKERS: dict[str, list[tuple[str, Breaker]]] = {}


def breaks(rule: str) -> Callable[[Breaker], Breaker]:
    """Note that a program must be refused by `rule`."""

    def note(make: Breaker) -> Breaker:
        BREAKERS.setdefault(rule, []).append((make.__name__, make))
        return make

    return note


def with_axis(program: t.TileProgram, name: str, **changes) -> t.TileProgram:
    """The program with one axis changed."""
    return replace(program, axes=tuple(replace(a, **changes) if a.name == name else a for a in program.axes))


def with_ops(program: t.TileProgram, kind: type, when: Callable = lambda op: True, **changes) -> t.TileProgram:
    """The program with fields of the first operation of a kind changed."""
    done = []

    def change(op):
        if isinstance(op, kind) and not done and when(op):
            done.append(op)
            return replace(op, **changes)
        return op

    changed = good.edit(program, change)
    assert done, "the operation to break is not there"
    return changed


def without(program: t.TileProgram, when: Callable) -> t.TileProgram:
    """The program without the operations for which `when` holds."""
    return good.edit(program, lambda op: None if when(op) else op)


def float_binary(op) -> bool:
    return isinstance(op, t.Binary) and op.out.dtype == "float32" and op.op in ("add", "mul")


@breaks("blocks")
def block_of_three():
    return with_axis(good.norm_program(), "T", block=3)


@breaks("blocks")
def whole_axis_larger_than_its_block():
    return with_axis(good.norm_program(), "H", extent=65)


@breaks("blocks")
def whole_axis_of_dynamic_size():
    return with_axis(good.norm_program(), "H", extent=None)


@breaks("blocks")
def unknown_mode():
    return with_axis(good.norm_program(), "H", mode="hole")


@breaks("defined_once")
def value_never_defined():
    return without(good.norm_program(), lambda op: isinstance(op, t.Unary) and op.op == "rsqrt")


@breaks("defined_once")
def value_defined_twice():
    program = good.norm_program()
    return replace(program, body=(program.body[0], *program.body))


@breaks("defined_once")
def used_before_its_definition():
    program = good.norm_program()
    return replace(program, body=program.body[::-1])


@breaks("defined_once")
def value_of_a_loop_body_used_after_the_loop():
    program = good.looped_program()
    inner = good.operations(program, t.Loop)[0].body[0].out
    return replace(program, body=(*program.body, t.Cast(t.Value("late", "float32", inner.axes), inner)))


@breaks("defined_once")
def yield_of_nothing():
    return with_ops(good.looped_program(), t.Loop, lambda op: op.yields, yields=(t.Value("nothing", "float32", ("T", "H")),))


@breaks("types")
def sum_of_two_dtypes():
    program = good.norm_program()
    narrow = good.operations(program, t.Load)[0].out
    wide = next(op for op in good.operations(program, t.Binary) if float_binary(op))
    return with_ops(program, t.Binary, lambda op: op == wide, left=replace(wide.left, dtype=narrow.dtype))


@breaks("types")
def result_without_an_axis():
    program = good.norm_program()
    wide = next(op for op in good.operations(program, t.Binary) if float_binary(op))
    return with_ops(program, t.Binary, lambda op: op == wide, out=replace(wide.out, axes=("H",)))


@breaks("types")
def comparison_that_is_no_bool():
    program = good.lookup_program()
    compare = next(op for op in good.operations(program, t.Binary) if op.op == "ge")
    return with_ops(program, t.Binary, lambda op: op == compare, out=replace(compare.out, dtype="int32"))


@breaks("types")
def root_of_a_narrow_float():
    program = good.norm_program()
    root = next(op for op in good.operations(program, t.Unary) if op.op == "rsqrt")
    return with_ops(program, t.Unary, lambda op: op == root, value=replace(root.value, dtype="bfloat16"))


@breaks("types")
def reduction_of_a_narrow_float():
    op = good.operations(good.norm_program(), t.Reduce)[0]
    narrow = {"value": replace(op.value, dtype="bfloat16"), "out": replace(op.out, dtype="bfloat16")}
    return with_ops(good.norm_program(), t.Reduce, **narrow)


@breaks("types")
def dot_that_accumulates_in_bfloat16():
    op = good.operations(good.gemm_program(), t.Dot)[0]
    return with_ops(good.gemm_program(), t.Dot, out=replace(op.out, dtype="bfloat16"))


@breaks("types")
def dot_of_swapped_operands():
    op = good.operations(good.gemm_program(), t.Dot)[0]
    return with_ops(good.gemm_program(), t.Dot, left=op.right, right=op.left)


@breaks("blocks")
def twice_an_axis_in_a_block_as_large_as_its_own():
    return with_axis(good.tall_program(), "I.twice", extent=16, block=16)


@breaks("types")
def sides_of_an_axis_that_is_not_twice_another():
    return with_ops(good.tall_program(), t.Sides, axis="I")


@breaks("types")
def third_half():
    return with_ops(good.tall_program(), t.Half, side=2)


@breaks("types")
def half_that_is_still_twice_as_wide():
    op = good.operations(good.tall_program(), t.Half)[0]
    return with_ops(good.tall_program(), t.Half, out=replace(op.out, axes=op.value.axes))


@breaks("types")
def index_along_twice_another_axis():
    return with_ops(good.tall_program(), t.Index, lambda op: op.out.axes == ("I.twice",), axis="T")


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


@breaks("grid_indices")
def twins_of_the_first_program_everywhere():
    return with_ops(good.tall_program(), t.Index, lambda op: op.out.axes == ("I.twice",), start=None)


def flat_loop(program: t.TileProgram) -> t.Loop:
    return next(op for op in good.operations(program, t.Loop) if op.flat)


@breaks("flat_loops")
def flat_loop_around_none():
    return with_ops(good.tall_program(), t.Loop, lambda op: not op.flat, flat=True)


@breaks("flat_loops")
def flat_loop_that_loads_beside_the_one_within():
    program = good.tall_program()
    outer = flat_loop(program)
    load = next(op for op in good.operations(program, t.Load))
    plain = replace(load, out=replace(load.out, name="beside", axes=()), index=(None,) * len(load.index), mask=None)
    return with_ops(program, t.Loop, lambda op: op.flat, body=(plain, *outer.body))


@breaks("flat_loops")
def flat_loop_whose_inner_one_goes_on_from_before():
    program = good.tall_program()
    outer = flat_loop(program)
    inner = next(op for op in outer.body if isinstance(op, t.Loop))
    body = tuple(replace(op, inits=outer.carries) if op == inner else op for op in outer.body)
    return with_ops(program, t.Loop, lambda op: op.flat, body=body)


@breaks("types")
def load_of_another_dtype():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, out=replace(op.out, dtype="float32"))


@breaks("types")
def load_with_too_few_indices():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, index=op.index[:1], wide=op.wide[:1])


@breaks("types")
def load_whose_block_lacks_an_axis_of_its_index():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, out=replace(op.out, axes=("H",)))


@breaks("types")
def store_that_is_not_cast():
    op = good.operations(good.norm_program(), t.Store)[0]
    return with_ops(good.norm_program(), t.Store, value=replace(op.value, dtype="float32"))


@breaks("types")
def condition_that_is_no_mask():
    program = good.norm_program("T:grid:4 H:whole:64")
    op = good.operations(good.gemm_program(), t.Load)[0]
    value = good.operations(program, t.Load)[0].out
    choice = t.Where(t.Value("choice", value.dtype, value.axes), value, value, value)
    assert op.mask is not None
    return replace(program, body=(*program.body[:-1], choice, program.body[-1]))


@breaks("types")
def loop_that_carries_more_than_it_yields():
    op = next(op for op in good.operations(good.looped_program(), t.Loop) if op.yields)
    return with_ops(good.looped_program(), t.Loop, lambda x: x.yields, inits=(*op.inits, op.inits[0]))


@breaks("types")
def cast_that_changes_the_axes():
    op = good.operations(good.norm_program(), t.Cast)[0]
    return with_ops(good.norm_program(), t.Cast, out=replace(op.out, axes=("H",)))


@breaks("grid")
def grid_axis_left_out():
    return replace(good.gemm_program(), grid=("T",))


@breaks("grid")
def dynamic_axis_not_outermost():
    return replace(good.gemm_program(), grid=("P", "T"))


@breaks("grid_indices")
def every_program_does_the_first_block():
    return with_ops(good.norm_program(), t.Index, lambda op: op.axis == "T", start=None)


@breaks("grid_indices")
def blocks_that_overlap():
    program = good.norm_program()
    start = next(op for op in good.operations(program, t.Binary) if op.op == "mul" and op.out.dtype == "int32")
    half = t.Const(t.Value("half", "int32"), 2)
    changed = with_ops(program, t.Binary, lambda op: op == start, right=half.out)
    return replace(changed, body=(half, *changed.body))


@breaks("loops_cover")
def loop_that_ends_early():
    return with_ops(good.looped_program(), t.Loop, stop=48)


@breaks("loops_cover")
def loop_that_steps_too_far():
    return with_ops(good.looped_program(), t.Loop, step=32)


@breaks("loops_cover")
def loop_that_sees_the_first_block_only():
    program = good.looped_program()
    zero = t.Const(t.Value("zero", "int32"), 0)
    program = replace(program, body=(zero, *program.body))
    return with_ops(program, t.Index, lambda op: op.axis == "H", start=zero.out)


@breaks("loops_cover")
def sum_of_the_same_block_every_turn():
    program = good.looped_program()
    loop = next(op for op in good.operations(program, t.Loop) if op.yields)
    block = t.Full(t.Value("block", "float32", loop.yields[0].axes), 0.0)
    same = t.Binary(t.Value("same", "float32", block.out.axes), "add", loop.carries[0], block.out)
    return with_ops(program, t.Loop, lambda op: op == loop, body=(*loop.body, block, same), yields=(same.out,))


@breaks("loops_cover")
def part_that_ignores_its_number():
    first = good.split_programs()[0]
    loop = good.operations(first, t.Loop)[0]
    return with_ops(first, t.Index, lambda op: op.axis == "D", start=loop.var)


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


@breaks("reductions_masked")
def load_that_fills_with_ones():
    return with_ops(good.gemm_program(), t.Load, fill=1)


@breaks("reductions_masked")
def sum_without_a_mask():
    program = good.norm_program()
    masked = next(op for op in good.operations(program, t.Where))
    return with_ops(program, t.Reduce, value=masked.yes)


@breaks("reductions_masked")
def sum_filled_with_the_wrong_number():
    program = good.norm_program()
    one = t.Const(t.Value("filler", "float32"), 1.0)
    program = replace(program, body=(one, *program.body))
    return with_ops(program, t.Where, no=one.out)


@breaks("reductions_masked")
def maximum_filled_with_zero():
    return with_ops(good.norm_program(), t.Reduce, op="max")


@breaks("reductions_masked")
def accumulator_that_begins_at_one():
    return with_ops(good.looped_program(), t.Full, value=1.0)


@breaks("reductions_whole")
def sum_over_an_axis_of_the_grid():
    program = good.norm_program()
    op = good.operations(program, t.Store)[0]
    value = t.Cast(t.Value("wide", "float32", op.value.axes), op.value)
    rows = next(x.out for x in good.operations(program, t.InBounds) if x.axis == "T")
    zero = t.Const(t.Value("nothing", "float32"), 0.0)
    masked = t.Where(t.Value("kept", "float32", op.value.axes), rows, value.out, zero.out)
    total = t.Reduce(t.Value("total", "float32", ("H",)), "sum", masked.out, "T")
    return replace(program, body=(*program.body, value, zero, masked, total))


@breaks("reductions_whole")
def running_sum_of_one_block():
    program = good.looped_program()
    loop = next(op for op in good.operations(program, t.Loop) if op.yields)
    value = loop.body[-1].out
    scan = t.Scan(t.Value("running", value.dtype, value.axes), value, "H")
    return with_ops(program, t.Loop, lambda op: op == loop, body=(*loop.body, scan))


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


@breaks("stores_last")
def load_of_what_was_stored():
    program = good.accumulate_program()
    load = next(op for op in good.operations(program, t.Load) if op.tensor == "state")
    return replace(program, body=(*program.body, replace(load, out=replace(load.out, name="again"))))


@breaks("stores_last")
def output_stored_twice():
    program = good.norm_program()
    return replace(program, body=(*program.body, program.body[-1]))


@breaks("types")
def prefetch_of_three_lines():
    return with_ops(good.ahead_program(), t.Prefetch, size=192)


@breaks("types")
def prefetch_of_half_a_line():
    return with_ops(good.ahead_program(), t.Prefetch, size=32)


@breaks("types")
def prefetch_across_rows():
    return with_ops(good.ahead_program(), t.Prefetch, along=0)


@breaks("types")
def prefetch_beyond_the_dimensions():
    return with_ops(good.ahead_program(), t.Prefetch, along=2)


@breaks("types")
def prefetch_that_begins_at_a_block():
    program = good.ahead_program()
    index = good.operations(program, t.Prefetch)[0].index
    return with_ops(program, t.Prefetch, index=(index[0], index[0]))


@breaks("types")
def prefetch_with_a_mask_of_other_axes():
    program = good.ahead_program()
    mask = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "T")
    return with_ops(program, t.Prefetch, mask=mask)


@breaks("memory_masked")
def prefetch_past_the_last_row():
    return with_ops(good.ahead_program(), t.Prefetch, mask=None)


@breaks("wide_offsets")
def prefetch_in_32_bits():
    return with_ops(good.ahead_program(wide=True), t.Prefetch, wide=(False, False))


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
    program = good.norm_program("T:grid:1 H:whole:64")
    op = good.operations(program, t.Store)[0]
    return with_ops(program, t.Store, index=(None, op.index[1]))


@breaks("outputs_written")
def first_column_only():
    program = good.norm_program("T:grid:4 H:loop:1")
    op = good.operations(program, t.Store)[0]
    return with_ops(program, t.Store, index=(op.index[0], None))
