"""Mosaic GPU kernels without a GPU: interpreted, compiled for an H200, and run by a machine for what was compiled."""

import ast
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moekit.backends import mosaic
from moekit.compile import tile as t
from moekit.compile.passes.fragments import Fragment, fragments, neighbours
from moekit.compile.plan import plan
from moekit.compile.rules.warpgroups import warpgroups
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.directives import Tile
from moekit.compile.schedule.targets import TARGETS
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.jax import add_rms_norm, gate_gemm, op, silu_and_mul, topk_softmax, view
from moekit.jax import mosaic as launcher
from moekit.lang import In, cast, concat, contract, f32, fusion, gather, iota, mean, rsqrt, size
from moekit.lang import slice as piece
from moekit.lang.arguments import example
from moekit.lang.dtypes import FLOATS, itemsize
from moekit.testing import Call, operands
from moekit.testing.batch import check
from moekit.testing.suite import cases
from moekit.testing.values import shapes_of

from .emulated import assembled, emulated, h200
from .ptx import Race
from .samples import DECLARATIONS, SAMPLES, viewed

ROWS = ("silu_and_mul", "add_rms_norm", "gated_rms_norm", "shared_expert_combine", "topk_softmax", "delta_rule_step",
        "causal_conv1d_step")  # fmt: skip
SIZES = {
    "silu_and_mul": {"T": 7, "I": 37},
    "add_rms_norm": {"T": 3, "H": 100},
    "gated_rms_norm": {"T": 2, "V": 3, "D": 20},
    "shared_expert_combine": {"T": 4, "H": 40},
    "topk_softmax": {"T": 5, "E": 60},
    "delta_rule_step": {"T": 2, "K": 1, "V": 2, "Dk": 16, "Dv": 16},
    "causal_conv1d_step": {"T": 3, "C": 40, "S": 3},
    "expert_gate_up": {"T": 2, "K": 2, "E": 4, "I": 8, "D": 32},
    "expert_down": {"T": 2, "K": 2, "E": 4, "I": 16, "H": 32},
    "gate_gemm": {"T": 18, "D": 72, "P": 37},
    "gate_projections": {"T": 3, "D": 72, "I": 20, "E": 40, "G": 1},
    "gate_topk": {"T": 3, "D": 72, "I": 20, "E": 40, "G": 1},
    "down_combine": {"T": 3, "H": 40, "I": 24},
}
MORE = ("expert_gate_up", "expert_down")
PRODUCTS = ("gate_gemm", "gate_projections", "gate_topk", "down_combine")
PARAMS = {"topk_softmax": ({"k": 6},), "gate_topk": ({"k": 6},)}


def made(name: str, dtype: str = "bfloat16"):
    """The plan of a sample for Mosaic."""
    _, binding, graph = replace(SAMPLES[name], dtype=dtype).bound()
    return plan(graph, warpgroups(graph), viewed(graph, dict(binding.sizes)), dict(binding.sizes), "mosaic")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ROWS)
def test_every_kernel_compiles_for_an_h200(name, dtype):
    """One warpgroup, in registers, and what lies side by side in memory is loaded together."""
    (program,) = made(name, dtype).programs
    read, wrote = mosaic.buffers(program)
    kinds = {p.viewed.buffer: jax.ShapeDtypeStruct(p.viewed.base, p.dtype) for p in program.params}
    ptx, said = assembled(program, kinds, wrote, program.programs({"T": 4}))
    assert ".maxntid 128" in ptx
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128
    assert re.search(r"ld\.global\.v4\.b(32|16)", ptx)
    assert len(read) + len([b for b in wrote if b not in read]) == len(kinds)


@pytest.mark.parametrize("name", ["conv_projections", "expert_gate_up", "expert_down", "qkv_norm_rope"])
def test_more_kernels_compile_for_an_h200(name):
    """What is printed besides the row-wise ones: several sections, experts gathered by ids, caches written at positions."""
    for program in made(name).programs:
        _, wrote = mosaic.buffers(program)
        kinds = {p.viewed.buffer: jax.ShapeDtypeStruct(p.viewed.base, p.dtype) for p in program.params}
        _, said = assembled(program, kinds, wrote, program.programs({"T": 4}))
        assert "0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*PRODUCTS, "gate_block", "gate_projections_parts"])
def test_products_compile_for_an_h200(name, dtype):
    """On the matrix unit, both operands loaded into its registers 16 bytes at a time, with no shared memory between."""
    program = made(name, dtype).programs[0]
    _, wrote = mosaic.buffers(program)
    kinds = {p.viewed.buffer: jax.ShapeDtypeStruct(p.viewed.base, p.dtype) for p in program.params}
    ptx, said = assembled(program, kinds, wrote, program.programs({"T": 4}))
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    loops = sum(isinstance(op, t.Dot) for section in program.sections for op, _ in t.walk(section.body))
    assert ptx.count(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32") >= 2 * loops
    assert ptx.count("ld.global.v4.b32") >= 2 * loops
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert name == "gate_block" or "ld.shared" not in ptx  # its rows are added up across lanes
    assert name != "down_combine" or "ld.global" not in ptx.rpartition("mma.sync")[2]  # not what it is added to either


@pytest.mark.parametrize(("name", "sizes", "params"), [
    ("topk_softmax", {"T": 3, "E": 64}, {"k": 1}), ("causal_conv1d_step", {"T": 2, "C": 16, "S": 1}, {}),
])  # fmt: skip
def test_blocks_of_one_element_run_right(name, sizes, params):
    """A condition along such an axis is a number, of which Mosaic makes no block by itself."""
    with emulated() as machines:
        check("mosaic", Call(FUSIONS[name], operands(FUSIONS[name], sizes, "float32", "normal", 3, params), params))
    assert machines


def ruled(name: str) -> list:
    """The cases of a fusion under the rules' schedules: dtypes, kinds of layout, recipes of numbers."""
    every = (c.case for c in cases(FUSIONS[name], (SIZES[name],), PARAMS.get(name, ({},))))
    every = (case for case in every if case.schedule == "heuristic")
    return [case for case in every if name not in PRODUCTS or "float32" not in (case.dtypes.get("x"), case.dtypes.get("down"))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*ROWS, *MORE, *PRODUCTS])
def test_on_a_gpu(name, dtype):
    """Every fusion, dtype and kind of layout, in guarded memory with poisoned outputs, against the reference."""
    for case in ruled(name):
        if dtype in case.dtypes.values():
            check("mosaic", case)


def picked(name: str) -> list:
    """Few cases of a fusion that the machine is to run: dense, then with a layout of another kind for each tensor."""
    every = ruled(name)
    mixed, number = [c for c in every if c.layouts], (*ROWS, *PRODUCTS).index(name)
    return [every[number % (2 if name in PRODUCTS else 3)], mixed[number % len(mixed)]]


@pytest.mark.parametrize("name", [*ROWS, *PRODUCTS])
def test_compiled_kernels_run_right(name):
    """What is compiled for an H200, run by numpy: within the bound of the reference, in bounds, and without races."""
    with emulated() as machines:
        for case in picked(name)[1:]:
            check("mosaic", case)
    assert machines


@pytest.mark.parametrize("name", [*ROWS, *PRODUCTS])
def test_interpreted_kernels_are_right(name):
    for case in picked(name)[:1]:
        check("mosaic", case)


@pytest.mark.parametrize("name", ["add_rms_norm", "topk_softmax"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(name):
    rng = np.random.default_rng(5)
    sizes, face = {"add_rms_norm": 256, "topk_softmax": 64}, op(FUSIONS[name])
    x = jnp.asarray(rng.standard_normal((6, sizes[name])), jnp.bfloat16)
    more = (x[::-1], x[0]) if name == "add_rms_norm" else ()
    params = {"k": 4} if name == "topk_softmax" else {}
    with emulated():
        whole = face(x, *more, **params, implementation="mosaic")
        few = face(x[2:5], *(m[2:5] if m.ndim == 2 else m for m in more), **params, implementation="mosaic")
    for a, b in zip(whole, few, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[2:5], np.asarray(b))


@pytest.mark.parametrize("depth", [96, 1600])
def test_a_product_has_the_same_bits_whatever_is_beside_it(depth):
    """Blocks of 16, 32 and 64 rows, in turns of some lengths, whole and in parts of which the last is short, by the machine;
    what is large cancels, so that another order of sums would be seen."""
    rng = np.random.default_rng(6)
    x, w = (rng.standard_normal(shape) for shape in ((40, depth), (40, depth)))
    x[:, depth // 2 :], w[:, depth // 2 :] = -x[:, : depth // 2] * rng.choice([1, 1.0078125], depth // 2), w[:, : depth // 2]
    x, w = (jnp.asarray(each, jnp.bfloat16) for each in (x, w))
    few = str(product("gate_gemm", {"D": depth, "P": 40}, 4)[1])
    with emulated() as machines:
        whole = np.asarray(gate_gemm(x, w, implementation="mosaic"))
        for rows in (slice(3, 4), slice(14, 19)):
            np.testing.assert_array_equal(whole[rows], np.asarray(gate_gemm(x[rows], w, implementation="mosaic")))
        for block, turn in ((32, 64), (64, 32)):
            said = re.sub(r"loop:D:\d+", f"loop:D:{turn}", few.replace("tile:T:16", f"tile:T:{block}"))
            got = gate_gemm(x, w, implementation="mosaic", schedule=Schedule.parse(said))
            np.testing.assert_array_equal(whole, np.asarray(got), said)
    assert len(machines) >= 5
    np.testing.assert_allclose(whole.astype(np.float32), np.asarray(x, np.float32) @ np.asarray(w, np.float32).T, 1e-2, 0.5)


def product(name: str, sizes: dict, rows: int):
    """A fusion of these sizes traced in bfloat16, and its schedule for so many rows."""
    fusion, shapes = FUSIONS[name], shapes_of(FUSIONS[name], {**sizes, "T": rows}, {})
    dtypes = {n: "bfloat16" if "bfloat16" in fusion.tensors[n].dtypes else fusion.tensors[n].dtypes[0] for n in shapes}
    graph = fusion.trace(fusion.bind(shapes, dtypes, fusion.bind_params({})))
    return graph, warpgroups(graph, {"T": rows})


@pytest.mark.parametrize("said", [
    "tile:T:32 loop:D:64 tile:P:32 warps:4", "tile:T:64 loop:D:128 tile:P:64 warps:4",
    "tile:D.part:1 tile:T:32 loop:D:64 tile:P:128 warps:4 split:D:2 then loop:D.part:1 tile:T:1 tile:P:64 warps:4",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["dense", "turned", "odd", "columns"])
def test_operands_of_more_rows_come_by_way_of_shared_memory(said, kind):
    """In turns and parts, past the end of rows, columns and the summed axis; 16 bytes at a time where memory has them so, else
    fewer or one element: by the machine the bits are those of 16 rows, whose operands are loaded into registers."""
    depth, first = {"odd": 175, "columns": 160}.get(kind, 168), {"columns": 4}.get(kind, 0)
    rng = np.random.default_rng(9)
    x, w = (jnp.asarray(rng.standard_normal((n, depth + first)), jnp.bfloat16) for n in (70, 50))
    x, w = (view(each.T).T if kind == "turned" else view(each)[:, first:] for each in (x, w))
    few = re.sub("tile:T:(32|64)", "tile:T:16", said)
    with emulated() as machines:
        got, want = (gate_gemm(x, w, implementation="mosaic", schedule=Schedule.parse(s)) for s in (said, few))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert machines


@pytest.mark.parametrize(("name", "depth", "columns", "said"), [
    ("gate_gemm", 2048, 648, "loop:D:256 split:D:8"), ("gate_gemm", 2048, 1544, "loop:D:256 split:D:8"),
    ("gate_gemm", 2880, 648, "loop:D:256 split:D:12"), ("gate_gemm", 2**15, 648, "loop:D:512 split:D:64"),
    ("gate_gemm", 72, 37, "loop:D:128"), ("down_combine", 512, 2048, "loop:I:512"), ("down_combine", 1024, 2048, "loop:I:512"),
    ("down_combine", 2048, 4096, "loop:I:128 split:I:8"),
])  # fmt: skip
def test_turns_of_products_are_long(name, depth, columns, said):
    """Parts of a split are one turn each, as far as a schedule has so many and registers hold what a turn takes."""
    sizes = {"gate_gemm": {"D": depth, "P": columns}, "down_combine": {"I": depth, "H": columns}}[name]
    _, schedule = product(name, sizes, 4)
    assert " ".join(d for d in str(schedule.launches[0]).split() if d.startswith(("loop", "split"))) == said


@pytest.mark.parametrize(("name", "sizes", "blocks"), [
    ("gate_gemm", {"D": 2048, "P": 648}, {16: (16, 32), 32: (32, 32), 64: (64, 32), 128: (64, 64)}),
    ("down_combine", {"I": 512, "H": 2048}, {32: (16, 32), 64: (32, 32), 128: (64, 32), 256: (64, 64)}),
    ("down_combine", {"I": 64, "H": 2048}, {64: (16, 32), 128: (32, 32), 256: (64, 32), 1024: (64, 32)}),
    ("down_combine", {"I": 2048, "H": 4096}, {16: (16, 32), 32: (32, 32), 64: (64, 64)}),
    ("gate_projections", {"I": 512, "D": 2048, "E": 512, "G": 1}, {64: (64, 64)}),
    ("gate_projections", {"I": 4096, "D": 2048, "E": 512, "G": 1}, {128: (64, 64)}),
])  # fmt: skip
def test_blocks_of_more_rows_are_held(name, sizes, blocks):
    """As soon as there would be more than some programs on an SM, by registers or shared memory; parts are those of few rows,
    and no register is spilled."""
    _, few = product(name, sizes, 4)
    for rows, (block, columns) in blocks.items():
        graph, schedule = product(name, sizes, rows)
        assert [launch.cut for launch in schedule.launches] == [launch.cut for launch in few.launches]
        tiles = [d for s in schedule.launches[0].sections for d in s.all(Tile)]
        assert {d.block for d in tiles if d.axis == "T"} == {block}
        assert block == 16 or {d.block for d in tiles if d.axis != "T"} <= {1, columns}
        program = plan(graph, schedule, viewed(graph, {"T": rows}), {"T": rows}, "mosaic").programs[0]
        _, wrote = mosaic.buffers(program)
        kinds = {p.viewed.buffer: jax.ShapeDtypeStruct(p.viewed.base, p.dtype) for p in program.params}
        ptx, said = assembled(program, kinds, wrote, program.programs({"T": rows}))
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        assert ("bar.red" in ptx) == (block == 16)
        assert ("cp.async.cg.shared.global" in ptx) == (block > 16 and sizes.get("I") != 64)


def test_a_loop_may_end_where_data_say():
    """Products with matrices that ids pick, which end at once where an id is of none; in interpret mode and by the machine."""
    sizes, fusion = {"T": 3, "D": 72, "K": 2, "E": 4, "I": 40, "H": 48}, FUSIONS["experts"]
    given = operands(fusion, sizes, "bfloat16", "normal", 3)
    given["ids"] = np.array([[2, -1], [4, 0], [3, 3]], np.int32)
    steps = ("tile:B:1 tile:J:16 loop:D:32 tile:I:32 warps:4 stage:activated",
             "tile:B:1 tile:J:16 loop:I:32 tile:H:32 warps:4 stage:placed", "tile:T:1 loop:K:1 tile:H:64 warps:4")  # fmt: skip
    case = Call(fusion, given, schedule=Schedule.parse(" then ".join(steps)))
    check("mosaic", case)
    with emulated() as machines:
        check("mosaic", case)
    assert len(machines) == 3


def _product_norm(x, w):
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return {"out": y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1)}


@fusion(_product_norm, x=In("T D"), w=In("P D"))
def product_norm(x, w):
    """Rows of x·wᵀ over their norms. x [T, D], w [P, D] -> [T, P] in x's dtype."""
    y = contract(x, w, over="D")
    return cast(y * rsqrt(mean(y * y, over="P") + 1.0), x.dtype)


@fusion(lambda x, w: {"out": x.astype(np.float64) @ w.astype(np.float64).T}, x=In("T D"), w=In("P D"))
def turned_product(x, w):
    """x·wᵀ, said the other way about. x [T, D], w [P, D] -> [T, P] in x's dtype."""
    return cast(contract(w, x, over="D"), x.dtype)


def test_a_weight_may_stand_first():
    """A program has rows before columns, whichever operand the weight is."""
    check("mosaic", Call(turned_product, operands(turned_product, {"T": 5, "D": 40, "P": 50}, "bfloat16", "normal", 8)))


def test_what_follows_a_product_adds_up_along_its_columns():
    """Over lanes and warps, each of which has some of a row's columns; part of the block is past the end."""
    case = Call(product_norm, operands(product_norm, {"T": 5, "D": 40, "P": 50}, "bfloat16", "normal", 8))
    case = replace(case, schedule=Schedule.parse("tile:T:16 loop:D:32 whole:P:64 warps:4 stages:2"))
    check("mosaic", case)
    with emulated() as machines:
        check("mosaic", case)
    assert machines


def test_the_order_within_a_step_is_both_operands():
    """Columns and rows that pick one element of the summed axis each: no other one is met."""
    w = jnp.eye(96, dtype=jnp.bfloat16)[::-1]
    x = jnp.asarray(np.random.default_rng(7).standard_normal((5, 96)), jnp.bfloat16)
    with emulated() as machines:
        np.testing.assert_array_equal(gate_gemm(x, w, implementation="mosaic"), np.asarray(x)[:, ::-1])
        turned = gate_gemm(view(x.T).T, w, implementation="mosaic")  # no element beside another along the summed axis
    np.testing.assert_array_equal(turned, np.asarray(x)[:, ::-1])
    assert machines


def test_shard_map_with_its_check():
    """Two H200s, rows cut, a state donated: JAX's check passes, and a kernel is one call, in place."""
    mesh = h200(2)
    cut, whole = PartitionSpec("tp"), PartitionSpec()

    def step(x, state, weight):
        return op(FUSIONS["causal_conv1d_step"])(x, state, weight, implementation="mosaic")

    given = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
             for s, p in (((8, 128), cut), ((8, 128, 3), cut), ((128, 4), whole))]  # fmt: skip
    run = jax.shard_map(step, mesh=mesh, in_specs=(cut, cut, whole), out_specs=(cut, cut))
    with jax.set_mesh(mesh):
        text = jax.jit(run, donate_argnums=1).lower(*given).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert "copy(" not in text


def test_threads_that_store_what_others_read_wait(monkeypatch):
    """Fewer elements than threads, updated in place: without a barrier the machine sees the race."""
    x = jnp.ones((3, 16), jnp.float32)
    run = lambda: add_rms_norm(x, x + 1, x[0], implementation="mosaic", schedule=Schedule.parse("tile:T:1 whole:H:16"))  # noqa: E731
    with emulated() as machines:
        run()
    assert machines
    monkeypatch.setattr(mosaic.MosaicPrinter, "held_twice", lambda self, op: False)
    jax.clear_caches()
    from moekit.jax import program

    launcher.kernel.cache_clear()
    program.launched.cache_clear()
    with emulated(), pytest.raises(Exception, match="while another thread reads it"):
        run()
    launcher.kernel.cache_clear()
    program.launched.cache_clear()
    assert issubclass(Race, AssertionError)


@pytest.mark.parametrize("name", ROWS)
def test_fragments_cover_blocks(name):
    """Warps, lanes and neighbours divide every axis, and no more threads than there are hold elements of their own."""
    for program in made(name).programs:
        for found in fragments(program, TARGETS["mosaic"]).held:
            for i, axis in ((i, axis) for i, slot in enumerate(found.slots) for axis in slot):
                assert program.axis(axis).block == found.sizes[i]
                assert found.sizes[i] % (found.warps[i] * found.lanes[i] * found.vector[i]) == 0
                assert 4 % np.prod(found.warps) == 32 % np.prod(found.lanes) == 0


@pytest.mark.parametrize("name", ["gate_topk", "gated_rms_norm", "topk_softmax"])
def test_what_warps_add_up_together_is_no_longer_than_an_access(name, monkeypatch):
    """Mosaic has no reduction across warps of vectors of more than 16 bytes: in no layout that is served is one asked for."""
    programs, call = [], launcher.call
    monkeypatch.setattr(launcher, "call", lambda program, *more: programs.append(program) or call(program, *more))
    for case in ruled(name):
        check("mosaic", case)
    assert len(programs) >= len(ruled(name))
    for section in (s for program in programs for s in program.sections):
        for sum_ in (o for o, _ in t.walk(section.body) if isinstance(o, t.Reduce)):
            axes = sum_.value.axes
            found = fragments(section, TARGETS["mosaic"]).of(axes, sum_.value)
            kept = [v for slot, v in zip(found.slots, found.vector, strict=True) if {*slot} & {*axes} - {sum_.axis}]
            warps, _, _ = found.along_slot(sum_.axis)
            assert warps == 1 or max(kept, default=1) * itemsize(sum_.value.dtype) <= 16


@pytest.mark.parametrize("name", [*ROWS, *MORE])
def test_a_warp_has_whole_lines(name):
    """Of the largest array that is loaded or stored, 128 bytes of neighbours at least are in lanes of one warp."""
    for program in (s for kernel in made(name).programs for s in kernel.sections):
        accesses = [op.at for op, _ in t.walk(program.body) if isinstance(op, t.Load | t.Store)]
        at = max(accesses, key=lambda at: np.prod(program.block(program.ordered(at.axes))))
        if (along := neighbours(program, at)) is not None:
            found = fragments(program, TARGETS["mosaic"]).of((along,))
            i = next(i for i, slot in enumerate(found.slots) if along in slot)
            size = itemsize(program.param(at.tensor).dtype)
            assert found.warps[i] == 1 or found.lanes[i] * found.vector[i] * size >= 128


def swapped_reference(x, w):
    half, x = w.shape[0], x.astype(np.float64)
    across = np.concatenate([x[:, half : 2 * half], x[:, :half], x[:, 2 * half :]], axis=1)
    return {"out": across * w.astype(np.float64)[np.arange(x.shape[1]) % half]}


@fusion(swapped_reference, x=In("T 2*R+N"), w=In("R"))
def swapped(x, w):
    """The first two of a row's parts change places, and all are weighed. x [T, 2R + N], w [R] -> like x."""
    row, half = "2*R+N", size("R")
    first, second = (piece(x, row, start, half, into="R") for start in (0, half))
    rest = piece(x, row, 2 * half, size(row) - 2 * half, into="P")
    across = concat(second, first, rest, over="R R P", into=row)
    return cast(f32(across) * f32(gather(w, iota(row) % half, over="R")), x.dtype)


@pytest.mark.parametrize(("half", "width"), [(64, 8), (68, 4), (65, 1)])
def test_neighbours_further_on_are_loaded_together(half, width, monkeypatch):
    """Up to as many as a group of those that are put elsewhere has; of 65 each by itself."""
    sizes = {"T": 3, "R": half, "N": 1024 - 2 * half}
    given, programs, call = operands(swapped, sizes, "bfloat16", "normal", 6), [], launcher.call
    monkeypatch.setattr(launcher, "call", lambda program, *more: programs.append(program) or call(program, *more))
    check("mosaic", Call(swapped, given))
    monkeypatch.undo()
    with emulated() as machines:
        check("mosaic", Call(swapped, given))
    assert machines
    calls = [n for n in ast.walk(ast.parse(mosaic.emit(programs[0]))) if isinstance(n, ast.Call)]
    accesses = [n for n in calls if ast.unparse(n.func) == "load"]
    said = [{k.arg: ast.unparse(k.value) for k in n.keywords} for n in accesses]
    assert [int(n.get("width", 1)) for n in said if "mask" in n] == [width] * 3


def test_ranks_are_a_lane_each():
    """What a top_k has found is not in every lane's registers, and is stored together."""
    (program,) = made("topk_softmax").programs
    (section,) = program.sections
    assert fragments(section, TARGETS["mosaic"]).of(("T", "K")).along_slot("K") == (1, 32, 1)
    kinds = {p.viewed.buffer: jax.ShapeDtypeStruct(p.viewed.base, p.dtype) for p in program.params}
    ptx, _ = assembled(program, kinds, mosaic.buffers(program)[1], program.programs({"T": 4}))
    assert ptx.count("st.global") == 2  # weights and ids


def test_a_layout_is_said_by_what_a_value_lacks():
    found = Fragment((("T",), ("S", "S+1"), ("H",)), (4, 4, 64), (4, 1, 1), (1, 1, 32), (1, 1, 2))
    assert found.without(("T", "S+1")) == (2,)
    assert found.threads(("T", "S")) == 4
    assert found.each("H") == 2


def test_what_is_not_printed_says_so():
    """In one sentence, before anything is compiled; and never chosen otherwise."""
    x, w = jnp.ones((2, 64), jnp.float32), jnp.ones((32, 64), jnp.float32)
    said = r"^gate_gemm\w*: products of float32 are not printed for Mosaic GPU so far; choose pallas$"
    with pytest.raises(UnavailableError, match=said):
        gate_gemm(x, w, implementation="mosaic")
    jax.eval_shape(gate_gemm, x, w)
    narrow = Schedule.parse("tile:T:16 loop:D:64 tile:P:16 warps:4 stages:2")
    with pytest.raises(UnavailableError, match=r"^gate_gemm: products of blocks of 16 × 16 × 64 are not printed for"):
        gate_gemm(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), implementation="mosaic", schedule=narrow)
    chained = made("delta_rule_chunks").programs[0]
    assert mosaic.refusal(chained) == (
        "delta_rule_chunks: products of products are not printed for Mosaic GPU so far; choose pallas"
    )
    _, binding, graph = SAMPLES["scaled_expert_down"].bound()
    why = mosaic.unprinted(graph, dict(binding.sizes))
    assert why == "scaled_expert_down: down is float8_e4m3fn, which is not printed for Mosaic GPU so far; choose pallas"


def test_products_of_products_past_an_end_are_refused_alike():
    """Experts narrower than their blocks: masks of what is multiplied next are of the same elements; the call is refused."""
    sizes = {"T": 2, "K": 1, "E": 2, "D": 16, "I": 2, "H": 16}
    binding = example(FUSIONS["scaled_experts"], sizes, "float32", {"inner": 16, "columns": 16})
    graph = FUSIONS["scaled_experts"].trace(binding)
    why = mosaic.unprinted(graph, graph.sizes(dict(binding.sizes)))
    assert str(why).endswith("not printed for Mosaic GPU so far; choose pallas")


def test_rows_of_a_warp_go_to_a_warpgroup_together():
    """As many as it has warps, whatever the number of rows."""
    for rows in (4, 4096):
        fusion = DECLARATIONS["topk_softmax"]
        graph = fusion.trace(fusion.bind({"logits": (rows, 512)}, {"logits": "bfloat16"}, fusion.bind_params({"k": 10})))
        (launch,) = warpgroups(graph).launches
        assert (launch.sections[0].block("T"), launch.warps) == (4, 4)
    (program,) = made("topk_softmax").programs
    assert isinstance(program, t.TileProgram)
    for axis, vector in (("E", 8), ("K", 1)):
        found = fragments(program, TARGETS["mosaic"]).of((axis,))
        assert (found.warps, found.lanes, found.vector) == ((4, 1), (1, 32), (1, vector))


def test_views_picks_and_vmap():
    """Elements that data pick, an output in part of an array, and batches, in interpret mode and by the machine."""
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((3, 4, 40)), jnp.float32)
    run = jax.jit(lambda s, i: silu_and_mul(view(s)[i, :, 4:36], implementation="mosaic"))
    wanted = silu_and_mul(stack[2, :, 4:36], implementation="xla")
    np.testing.assert_allclose(run(stack, jnp.int32(2)), wanted, rtol=1e-6)
    with emulated() as machines:
        np.testing.assert_allclose(jax.jit(lambda s, i: run.__wrapped__(s, i))(stack, jnp.int32(2)), wanted, rtol=1e-5)
        out = topk_softmax(view(stack)[1, :, ::2], 3, implementation="mosaic")
    assert machines
    for got, want in zip(out, topk_softmax(stack[1, :, ::2], 3, implementation="xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    both = jax.vmap(lambda x: silu_and_mul(x, implementation="mosaic"))(stack)
    np.testing.assert_allclose(both[1], silu_and_mul(stack[1], implementation="xla"), rtol=1e-6)
