"""Every kernel compiled for sm_90, sm_100 and gfx942 by Triton's own compiler, without a GPU."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moekit.compat import release
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile import layouts
from moekit.fusions import FUSIONS
from moekit.jax import launch
from moekit.lang import In, contract, fusion
from moekit.lang.dtypes import itemsize
from moekit.testing import Call, operands
from moekit.testing.probes import PROBES
from tests.compile import unseen

from .samples import SAMPLES, strided, viewed

triton = pytest.importorskip("triton")
from .sm_90 import TARGETS, compiled, crossed, disassembled  # noqa: E402

H200 = Path(__file__).parents[1] / "data/h200.textproto"
STACK = {"qk_norm_rope": 32, "qkv_norm_rope": 32}  # bytes: libdevice's sine has the digits of an angle times 2/π
STACK["delta_rule_chunks", "float32"] = 2656  # whole products in registers; a prompt's operands are narrower
if release(triton.__version__) >= (3, 8):
    STACK["gate_block", "bfloat16"] = 8  # what does not fit into the 128 registers that it is given there
    STACK["delta_rule_chunks", "float32"] = 2672


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and stack bytes of a cubin, as cuobjdump reports them."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", list(SAMPLES))
def test_sm_90_without_spills(name, dtype, tmp_path):
    """The default schedules keep everything in registers, float32 is never TF32, and aligned rows load 16 bytes."""
    stacks = []
    for program in replace(SAMPLES[name], dtype=dtype).strided().programs:
        built = compiled(program)
        used = resources(built.asm["cubin"], tmp_path)
        stacks.append(used["STACK"])
        assert used["REG"] <= 255
        ptx = built.asm["ptx"]
        if dtype == "float32":
            assert "tf32" not in ptx
        if name == "add_rms_norm":
            assert set(re.findall(r"ld\.global\.\S*", ptx)) == {"ld.global.v4.b32"}
    assert max(stacks) == STACK.get((name, dtype), STACK.get(name, 0))


@pytest.mark.parametrize("name", ["scaled_expert_gate_up", "scaled_conv_projections", "conv_projections"])
def test_lanes_that_add_up_products_have_the_same_sum(name):
    """A lane that has one product of a sum would make an fma of it and its neighbour's, and each has another one to round."""
    for program in SAMPLES[name].strided().programs:
        assert not crossed(disassembled(compiled(program).asm["cubin"]))


@pytest.mark.parametrize("columns", [8, 16])
def test_conversions_to_float8_of_what_is_past_the_end_are_whole(columns):
    """ptxas packed two of the same with the stack's pointer (R1) for half of the result, where it knew them to be the same."""
    shape = {"x": (9, 3), "codes": (9, 1, columns), "scale": (9, 1)}
    case = Call(FUSIONS["quantised"], {"x": np.zeros(shape["x"], np.float16)}, {"columns": columns})
    rows = {"x": (3, 1), "codes": (16 * columns, columns, 1), "scale": (1, 1)}
    lying = {n: layouts.strided(shape[n], rows[n], t.axes, "T", itemsize(t.dtype)) for n, t in case.graph.tensors.items()}
    (program,) = plan(case.graph, None, lying).programs
    packed = re.findall(r"F2FP.*E4M3.*", disassembled(compiled(program).asm["cubin"]))
    assert packed
    assert not [p for p in packed if re.search(r"\bR1\b", p)]


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
@pytest.mark.parametrize("name", list(SAMPLES))
def test_other_targets(name, target):
    """The same text compiles for Blackwell and for AMD."""
    for program in SAMPLES[name].strided().programs:
        assert compiled(program, target).asm


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_large_angles_are_reduced_by_all_of_two_over_pi(target):
    """Sine and cosine are libdevice's, which has 2/π in 24 bytes for angles from 105615 on, and not the approximate ones."""
    sizes = {"T": 4, "D": 32}
    call = Call(unseen.waves, operands(unseen.waves, sizes, "float32"))
    (program,) = plan(call.graph, None, strided(call.graph, sizes)).programs
    ptx = compiled(program, target).asm["ptx"]
    assert ptx.count("__cudart_i2opi_f[") == 1
    assert "sin.approx" not in ptx
    assert "cos.approx" not in ptx


@pytest.mark.parametrize("name", ["add_rms_norm", "gated_rms_norm"])
def test_declared_roundings_survive(name):
    """A narrowing cast that is widened again is still two conversions in the compiled program."""
    (program,) = SAMPLES[name].strided().programs
    ttir = compiled(program).asm["ttgir"]
    rounded = set(re.findall(r"(%\S+) = arith.truncf", ttir))
    widened = re.findall(r"arith.extf (%\S+) ", ttir)
    assert rounded & set(widened)


@pytest.mark.parametrize("target", list(TARGETS))
def test_weights_of_one_byte(target, tmp_path):
    """Loaded 16 at a time, converted, and multiplied in the other operand's dtype: FP8 products add up in fewer bits."""
    sizes = {"T": 4, "N": 512, "D": 2048}
    call = Call(PROBES["probe_stored"], operands(PROBES["probe_stored"], sizes, "bfloat16"))
    built = [compiled(program, target) for program in plan(call.graph, None, strided(call.graph, sizes)).programs]
    if target == "gfx942":
        return
    text = "\n".join(x.asm["ptx"] for x in built)
    assert "ld.global.v4.b32" in text
    assert "cvt.rn.f16x2.e4m3x2" in text
    assert set(re.findall(r"mma\.sync\S*", text)) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
    assert not any(resources(x.asm["cubin"], tmp_path)["STACK"] for x in built if target == "sm_90")


@fusion(x=In("T D", dtype="float32"), w=In("D P", dtype="float32"))
def along_the_middle(x, w):
    """A product that lanes add up, the sum's axis between the others."""
    return contract(x, w, over="D")


def ptx_by_xla(graph, sizes: dict[str, int], schedule: Schedule, folder: Path) -> str:
    """The PTX of a Pallas kernel of float32 operands in a jitted function."""
    jax, topologies = pytest.importorskip("jax"), pytest.importorskip("jax.experimental.topologies")
    made = plan(graph, schedule, viewed(graph, sizes), sizes)
    shapes = {n: tuple(sizes[a] for a in x.axes) for n, x in graph.tensors.items()}
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200.read_text(), topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices).reshape(-1), ("tp",))
    alone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(shapes[n], "float32", sharding=alone) for n in ("x", "w")]

    def run(x, w):
        return launch.launch(made, {"x": x, "w": w}, {"out": (shapes["out"], jax.numpy.float32)}, sizes, {})

    with jax.set_mesh(mesh):
        options = {"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"}
        jax.jit(run).lower(*args).compile(compiler_options=options)
    (dumped,) = folder.glob("*.ptx")
    return dumped.read_text()


@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize("backend", ["triton", "xla"])
def test_sums_along_the_middle_are_float32(backend, depth, tmp_path):
    """Triton takes sum(x[:, :, None] * y[None, :, :], axis=1) for a product, which it makes in TF32, and wrongly if short."""
    sizes = {"T": 16, "D": depth, "P": 32}
    graph = Call(along_the_middle, operands(along_the_middle, sizes, "float32")).graph
    schedule = Schedule.parse(f"tile:T:16 whole:D:{depth} tile:P:32")
    if backend == "xla":
        ptx = ptx_by_xla(graph, sizes, schedule, tmp_path)
    else:
        (program,) = plan(graph, schedule, strided(graph, sizes)).programs
        ptx = compiled(program).asm["ptx"]
    assert "mma" not in ptx
