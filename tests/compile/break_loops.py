"""Programs that break a rule of the grid or of loops, or reduce what they must not see."""

from __future__ import annotations

from dataclasses import replace

import programs as good
from breakers import breaks, with_axis, with_ops

from moekit.compile import tile as t
from moekit.compile.passes.rounds import rounds


def flat_loop(program: t.TileProgram) -> t.Loop:
    return next(op for op in good.operations(program, t.Loop) if len(op.over) > 1)


def is_flat(op: t.Loop) -> bool:
    return len(op.over) > 1


@breaks("grid")
def grid_axis_left_out():
    return replace(good.gemm_program(), grid=("T",))


@breaks("grid")
def dynamic_axis_not_outermost():
    return replace(good.gemm_program(), grid=("P", "T"))


@breaks("loops_cover")
def loop_over_an_axis_of_the_grid():
    program = good.looped_program()
    return with_ops(program, t.Loop, over=("T",))


@breaks("loops_cover")
def loop_that_sees_the_first_block_only():
    return with_ops(good.looped_program(), t.Elements, lambda op: op.axis == "H", turn=None)


@breaks("loops_cover")
def loop_that_sees_the_block_of_another():
    program = good.looped_program()
    zero = t.Const(t.Value(900, "int32"), 0)
    program = replace(program, body=(zero, *program.body))
    return with_ops(program, t.Elements, lambda op: op.axis == "H", turn=zero.out)


@breaks("loops_cover")
def rows_that_begin_at_the_turn_of_a_loop():
    program = good.looped_program()
    rows = next(op for op in good.operations(program, t.Elements) if op.axis == "T")
    loop = good.operations(program, t.Loop)[0]
    inner = replace(rows, out=replace(rows.out, number=900), turn=loop.vars[0])
    return with_ops(program, t.Loop, lambda op: op == loop, body=(inner, *loop.body))


@breaks("loops_cover")
def sum_of_the_same_block_every_turn():
    program = good.looped_program()
    loop = next(op for op in good.operations(program, t.Loop) if op.yields)
    block = t.Const(t.Value(900, "float32", loop.yields[0].axes), 0.0)
    same = t.Binary(t.Value(901, "float32", block.out.axes), "add", loop.carries[0], block.out)
    return with_ops(program, t.Loop, lambda op: op == loop, body=(*loop.body, block, same), yields=(same.out,))


@breaks("loops_cover")
def part_that_ignores_its_number():
    first = good.split_programs()[0]
    return with_ops(first, t.Elements, lambda op: op.axis == "D", part=None)


@breaks("loops_cover")
def part_with_the_number_of_a_row():
    first = good.split_programs()[0]
    rows = next(op.out for op in good.operations(first, t.Elements) if op.axis == "P")
    return with_ops(first, t.Elements, lambda op: op.axis == "D", part=rows)


@breaks("loops_cover")
def end_of_an_axis_that_is_not_looped_over():
    return with_ops(good.tall_program(), t.AtEnd, axis="T")


@breaks("flat_loops")
def flat_loop_over_an_axis_and_its_parts():
    program = good.tall_program()
    loop = flat_loop(program)
    return with_ops(program, t.Loop, is_flat, over=loop.over[::-1], vars=loop.vars[::-1])


@breaks("flat_loops")
def flat_loop_of_unknown_length():
    program = good.tall_program()
    program = with_ops(program, t.Elements, lambda op: op.axis == "D", part=None)
    return with_axis(program, "D", extent=None, parts=1)


@breaks("flat_loops")
def end_that_loads():
    program = good.tall_program()
    end = good.operations(program, t.AtEnd)[0]
    load = good.operations(program, t.Load)[0]
    plain = t.Access(load.at.tensor, tuple(t.Index() for _ in load.at.index), (), load.at.wide)
    more = t.Load(t.Value(900, load.out.dtype), plain)
    return with_ops(program, t.AtEnd, body=(more, *end.body))


@breaks("flat_loops")
def flat_loop_around_another():
    program = good.tall_program()
    loop = flat_loop(program)
    inner = t.Loop((t.Value(900, "int32"),), (2,), (), (), (), (), ())
    return with_ops(program, t.Loop, is_flat, body=(inner, *loop.body))


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
    one = t.Const(t.Value(900, "float32"), 1.0)
    program = replace(program, body=(one, *program.body))
    return with_ops(program, t.Where, no=one.out)


@breaks("reductions_masked")
def maximum_filled_with_zero():
    return with_ops(good.norm_program(), t.Reduce, op="max")


@breaks("reductions_masked")
def accumulator_that_begins_at_one():
    return with_ops(good.looped_program(), t.Const, lambda op: op.out.axes, value=1.0)


@breaks("reductions_whole")
def sum_over_an_axis_of_the_grid():
    program = good.norm_program()
    op = good.operations(program, t.Store)[0]
    value = t.Cast(t.Value(900, "float32", op.value.axes), op.value)
    rows = next(x.out for x in good.operations(program, t.InBounds) if x.axis == "T")
    zero = t.Const(t.Value(901, "float32"), 0.0)
    masked = t.Where(t.Value(902, "float32", op.value.axes), rows, value.out, zero.out)
    total = t.Reduce(t.Value(903, "float32", ("H",)), "sum", masked.out, "T")
    return replace(program, body=(*program.body, value, zero, masked, total))


@breaks("reductions_whole")
def running_sum_that_is_not_carried_on():
    program = good.running_program()
    (scan,) = good.operations(program, t.Scan)
    return with_ops(program, t.Binary, lambda op: scan.out in (op.left, op.right), op="sub")


@breaks("reductions_whole")
def running_sum_of_one_block():
    program = good.looped_program()
    loop = next(op for op in good.operations(program, t.Loop) if op.yields)
    value = loop.body[-1].out
    scan = t.Scan(t.Value(900, value.dtype, value.axes), value, "H")
    return with_ops(program, t.Loop, lambda op: op == loop, body=(*loop.body, scan))


def taking_turns() -> t.TileProgram:
    """A product whose columns' blocks two programs take in turn."""
    return rounds(good.gemm_program(), {"P": 2})


@breaks("grid")
def programs_in_rounds_of_more_than_there_are_blocks():
    program = taking_turns()
    return with_axis(program, "P", beside=100)


@breaks("grid")
def program_of_rounds_without_a_number():
    return replace(taking_turns(), grid=("T",))


@breaks("reductions_whole")
def sum_along_an_axis_in_rounds():
    graph = good.graph_of(good.FUSIONS["gate_gemm"], {"x": (20, 50), "packed": (48, 50)}, "bfloat16")
    program = rounds(good.planned(graph, "tile:T:16 loop:D:16 tile:P:16").programs[0], {"P": 2})
    (loop,) = [op for op in program.body if isinstance(op, t.Loop) and op.over == ("P",)]
    value = next(op for op in loop.body if isinstance(op, t.Loop)).outs[0]
    total = t.Reduce(t.Value(901, value.dtype, ("T",)), "sum", value, "P")
    body = tuple(x for op in loop.body for x in ((total, op) if isinstance(op, t.Store) else (op,)))
    return replace(program, body=tuple(replace(op, body=body) if op is loop else op for op in program.body))


@breaks("grid")
def store_outside_of_the_rounds():
    program = taking_turns()
    nothing = t.Const(t.Value(900, "bfloat16"), 0.0)
    out = next(p for p in program.params if p.role == "Out")
    store = t.Store(t.Access(out.name, tuple(t.Index() for _ in out.axes)), nothing.out)
    return replace(program, body=(*program.body, nothing, store))
