"""Grouped experts as they are compiled for sm_90: products on the matrix unit, no spills, one arithmetic for every block."""

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import prod

import pytest

pytest.importorskip("triton")

from moekit.compile.plan import plan
from moekit.compile.schedule.targets import MEASURED
from moekit.compile.tile import Store, walk
from moekit.fusions.experts import experts
from moekit.lang.arguments import example

from .samples import SAMPLES, strided
from .sm_90 import build, compiled


def kernels(block, width):
    """The last three launches: what is activated, what each pair gives, the sum."""
    sizes = {"T": 4, "D": 2048, "I": width, "H": 2048, "E": 512, "K": 10}
    binding = example(experts, sizes, "bfloat16", {"block": block})
    graph = experts.trace(binding)
    return plan(graph, None, strided(graph, dict(binding.sizes))).programs


@pytest.mark.parametrize("width", [512, 64])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_products_run_on_the_matrix_unit(block, width):
    *tables, up, down, total = kernels(block, width)
    for program in (*tables, up, down, total):
        assert build(program).spills == 0
    for program in (up, down):
        assert re.search(r"\b(mma\.sync|wgmma\.mma_async)", compiled(program).asm["ptx"])
        assert not build(program).serial


@pytest.mark.parametrize("block", [1, 16, 32, 64, 128])
def test_a_converted_weight_is_multiplied_from_registers(block):
    """By one instruction in all blocks of more than 16 pairs, with the summed axis as it lies, so a row has the same bits in
    them; in those of fewer by another one, which takes it in another order."""
    kind, along = ("mma.sync.aligned.m16k16", "4") if block <= 16 else ("wgmma.mma_async.sync.aligned.m64k16", "2")
    for program in replace(SAMPLES["scaled_experts"], params={"block": block}).strided().programs[-3:-1]:
        found = compiled(program).asm
        instructions = set(re.findall(r"\b(wgmma\.mma_async\.sync\.aligned\.m\w+|mma\.sync\.aligned\.m\w+)", found["ptx"]))
        assert {re.sub(r"n\d+", "", i) for i in instructions} == {kind}
        assert {*re.findall(r"kWidth = (\d)", found["ttgir"])} == {along}
        assert (build(program).spills, build(program).serial) == (0, False)


def arithmetic(program):
    """How often each kind of float instruction stands in a kernel, for each element that a lane stores."""
    (section,) = program.sections
    (stored,) = (op.value for op, _ in walk(section.body) if isinstance(op, Store))
    each = Fraction(prod(section.block(stored.axes)), 32 * program.warps)
    found = Counter(re.findall(r"\s(mma\.sync|fma|mul|add|sub)\.[\w.]*f32", compiled(program).asm["ptx"]))
    return {name: found[name] / each for name in ("mma.sync", "fma", "mul", "add", "sub")}


def test_one_pair_a_block_and_sixteen_are_computed_alike():
    """A product and a sum that become one rounding in one kernel, and two in the other, would show here."""
    for few, many in zip(kernels(1, 512)[-3:], kernels(16, 512)[-3:], strict=True):
        assert arithmetic(few) == arithmetic(many)


@pytest.mark.parametrize("sizes", [{"E": 60, "I": 50, "D": 200, "H": 200}, {"E": 64, "I": 64, "D": 128, "H": 256}])
def test_float32_fits_in_shared_memory(sizes):
    """Beside the matrix unit a block of products is large: there is no room for the loads of the next turns."""
    binding = example(experts, {"T": 5, "K": 2, **sizes}, "float32", {"block": 1})
    graph = experts.trace(binding)
    for program in plan(graph, None, strided(graph, dict(binding.sizes))).programs:
        assert compiled(program).metadata.shared <= MEASURED.shared_memory
