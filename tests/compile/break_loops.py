"""Programs that break a rule of the grid or of loops, or reduce what they must not see."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_ops

from moekit.compile import tile as t


def flat_loop(program: t.TileProgram) -> t.Loop:
    return next(op for op in good.operations(program, t.Loop) if op.flat)


@breaks("grid")
def grid_axis_left_out():
    return replace(good.gemm_program(), grid=("T",))


@breaks("grid")
def dynamic_axis_not_outermost():
    return replace(good.gemm_program(), grid=("P", "T"))


@breaks("grid_indices")
def twins_of_the_first_program_everywhere():
    return with_ops(good.tall_program(), t.Index, lambda op: op.out.axes == ("I.twice",), start=None)


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
