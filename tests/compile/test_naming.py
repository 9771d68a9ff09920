"""Axes and operands may be called anything: no name in a kernel stands for two things, and none is a word of the language."""

import ast
import keyword
from dataclasses import replace

import numpy as np
import programs as good
import pytest

from moekit import lang as ml
from moekit.backends import triton
from moekit.compile import tile as t
from moekit.compile.passes.names import names as naming
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile import Strided
from moekit.lang import In, fusion
from moekit.testing import Call, check, operands

NAMES = [
    ("class", "H", "x", "y"),
    ("None", "H", "x", "y"),
    ("x_ptr", "H", "x", "y"),
    ("y_ref", "H", "x", "y"),
    ("T", "x_ptr", "x", "y"),
    ("x_stride_h", "H", "x", "y"),
    ("T", "H", "x", "x_ptr"),
    ("T", "H", "x", "y_stride_t"),
    ("tl", "jnp", "x", "y"),
    ("pl", "lax", "tl", "jnp"),
    ("triton", "range", "x", "print"),
    ("T", "nan_max", "nan_max", "y"),
    ("turn", "carry", "x", "y"),
    ("n_class", "class", "x", "y"),
    ("T", "if", "x", "self"),
]


def declared(rows: str, columns: str, a: str, b: str):
    """Products of two operands, with a sum and a maximum that loops."""
    scope = {"ml": ml, "np": np}
    exec(
        f"def product({a}, {b}):\n"
        f"    both = ml.f32({a}) * ml.f32({b})\n"
        f"    return {{'each': both, 'total': ml.sum(both, over={columns!r}), 'most': ml.max(both, over={columns!r})}}\n"
        f"def reference({a}, {b}):\n"
        f"    both = {a}.astype(np.float64) * {b}.astype(np.float64)\n"
        f"    return {{'each': both, 'total': both.sum(-1), 'most': both.max(-1)}}\n",
        scope,
    )
    shapes = {a: In(f"{rows} {columns}"), b: In(f"{rows} {columns}")}
    return fusion(scope["reference"], dynamic=rows, **shapes)(scope["product"])


def call(names) -> Call:
    rows, columns = names[:2]
    made = declared(*names)
    schedule = Schedule.parse(f"tile:{rows}:2 loop:{columns}:4 warps:1 stages:1")
    return Call(made, operands(made, {rows: 5, columns: 7}), schedule=schedule)


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_every_name_stands_for_one_thing(names):
    made = call(names)
    layouts = {n: Strided(("any",) * len(x.dims)) for n, x in made.graph.tensors.items()}
    (program,) = plan(made.graph, made.schedule, layouts).programs
    tree = ast.parse(triton.emit(program))
    kernel = [n for n in tree.body if isinstance(n, ast.FunctionDef)][-1]
    arguments = [a.arg for a in kernel.args.args]
    uses = [n for n in ast.walk(kernel) if isinstance(n, ast.Name)]
    local = {n.id for n in uses if isinstance(n.ctx, ast.Store)}
    outside = {"gdc_launch_dependents", "gdc_wait", "tl", "triton", "range", "float"}
    outside |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert len(arguments) == len(set(arguments))
    assert not set(arguments) & local
    assert not (set(arguments) | local) & outside
    assert {n.id for n in uses} <= set(arguments) | local | outside
    assert not any(keyword.iskeyword(a) for a in arguments)


@pytest.mark.parametrize("implementation", ["interpret", "pallas", "eager"])
@pytest.mark.parametrize("names", NAMES[::2], ids="-".join)
def test_it_computes_what_it_says(names, implementation):
    check(implementation, call(names))


def test_plain_names_stay():
    """What golden files show: T is T."""
    made = call(("T", "H", "x", "y"))
    (program,) = plan(
        made.graph, made.schedule, {n: Strided(("any",) * len(x.dims)) for n, x in made.graph.tensors.items()}
    ).programs
    assert "    x_ptr, y_ptr, each_ptr, total_ptr, most_ptr, T, x_stride_t" in triton.emit(program)


def test_a_name_is_taken_over_where_nothing_reads_the_value_any_more():
    """Of values that are called the same."""
    program = good.norm_program()
    draft = t.Draft(program, t.Numbers(program.body))
    first = draft.cast(next(op.out for op in program.body if isinstance(op, t.Load)), "float32")
    one = draft.binary("add", first, first, "sum")
    two = draft.binary("mul", one, one, "sum")
    three = draft.binary("add", two, two, "sum")
    four = draft.binary("sub", three, two, "sum")
    found = naming(replace(program, body=(*program.body, *draft.ops)))
    assert found[one] == found[two] == "sum_1"  # `sum` is Python's
    assert found[three] == found[four] != found[two]
