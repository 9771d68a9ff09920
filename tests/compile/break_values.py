"""Programs whose values break a rule: blocks, definitions, dtypes and axes."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_axis, with_ops, without

from moekit.compile import tile as t


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


@breaks("blocks")
def twice_an_axis_in_a_block_as_large_as_its_own():
    return with_axis(good.tall_program(), "I.twice", extent=16, block=16)


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
    return replace(program, body=(*program.body, t.Cast(t.Value(900, "float32", inner.axes), inner)))


@breaks("defined_once")
def yield_of_nothing():
    return with_ops(good.looped_program(), t.Loop, lambda op: op.yields, yields=(t.Value(900, "float32", ("T", "H")),))


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
    program = good.norm_program()
    op = next(op for op in good.operations(program, t.Binary) if float_binary(op))
    compare = t.Binary(t.Value(900, "int32", op.out.axes), "lt", op.out, op.out)
    return replace(program, body=(*program.body, compare))


@breaks("types")
def mask_that_is_no_bool():
    program = good.lookup_program()
    op = good.operations(program, t.InBounds)[0]
    return replace(program, body=(*program.body, replace(op, out=t.Value(900, "int32", op.out.axes))))


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


@breaks("types")
def second_half_of_an_axis_that_is_not_twice_another():
    return with_ops(good.tall_program(), t.Sides, axis="I")


@breaks("types")
def halves_of_an_axis_that_is_not_twice_another():
    return with_ops(good.tall_program(), t.Halves, axis="T")


@breaks("types")
def half_that_is_still_twice_as_wide():
    op = good.operations(good.tall_program(), t.Halves)[0]
    return with_ops(good.tall_program(), t.Halves, outs=(replace(op.outs[0], axes=op.value.axes), op.outs[1]))


@breaks("types")
def elements_of_another_axis():
    return with_ops(good.tall_program(), t.Elements, lambda op: op.out.axes == ("I.twice",), axis="T")


@breaks("types")
def load_of_another_dtype():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, out=replace(op.out, dtype="float32"))


@breaks("types")
def load_with_too_few_indices():
    op = good.operations(good.norm_program(), t.Load)[0]
    return with_ops(good.norm_program(), t.Load, at=replace(op.at, index=op.at.index[:1], wide=op.at.wide[:1]))


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
    program = good.norm_program("tile:T:4 whole:H:64")
    op = good.operations(good.gemm_program(), t.Load)[0]
    value = good.operations(program, t.Load)[0].out
    choice = t.Where(t.Value(900, value.dtype, value.axes), value, value, value)
    assert op.at.mask
    return replace(program, body=(*program.body[:-1], choice, program.body[-1]))


@breaks("types")
def loop_that_carries_more_than_it_yields():
    op = next(op for op in good.operations(good.looped_program(), t.Loop) if op.yields)
    return with_ops(good.looped_program(), t.Loop, lambda x: x.yields, inits=(*op.inits, op.inits[0]))


@breaks("types")
def cast_that_changes_the_axes():
    op = good.operations(good.norm_program(), t.Cast)[0]
    return with_ops(good.norm_program(), t.Cast, out=replace(op.out, axes=("H",)))


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
    at = good.operations(program, t.Prefetch)[0].at
    return with_ops(program, t.Prefetch, at=replace(at, index=(at.index[0], at.index[0])))


@breaks("types")
def prefetch_with_a_mask_of_other_axes():
    program = good.ahead_program()
    mask = next(op.out for op in good.operations(program, t.InBounds) if op.axis == "T")
    at = good.operations(program, t.Prefetch)[0].at
    return with_ops(program, t.Prefetch, at=replace(at, mask=(mask,)))


@breaks("types")
def end_that_gives_more_than_there_is_otherwise():
    op = next(op for op in good.operations(good.tall_program(), t.AtEnd))
    return with_ops(good.tall_program(), t.AtEnd, otherwise=op.otherwise[:1])


@breaks("types")
def loop_over_two_axes_with_three_variables():
    op = next(op for op in good.operations(good.tall_program(), t.Loop) if len(op.over) == 2)
    return with_ops(good.tall_program(), t.Loop, lambda x: x == op, vars=(*op.vars, t.Value(900, "int32")))
