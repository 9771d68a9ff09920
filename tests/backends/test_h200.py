"""JAX programs compiled for an H200 that is not there: no copies before kernels, every declared rounding, no TF32."""

import re
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moekit.jax import (
    add_rms_norm,
    down_combine,
    gate_gemm,
    op,
    pack_gate,
    shared_expert_combine,
    silu_and_mul,
    topk_softmax,
    view,
)

from .samples import DECLARATIONS, SAMPLES

DATA = Path(__file__).parents[1] / "data" / "h200.textproto"
gate_block = op(DECLARATIONS["gate_block"])


@pytest.fixture(scope="module")
def mesh():
    """One virtual H200."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology="1x1x1")
    return Mesh(np.array(topology.devices).reshape(-1), ("tp",))


def compiled(mesh, fn, shapes, donate=()) -> str:
    """The optimised HLO of `fn` for the mesh; `shapes` is a pytree of (shape, dtype)."""
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), s) for s in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile().as_text()


def kernels(text: str) -> int:
    """How many of moekit's kernels a program calls."""
    return text.count('custom_call_target="__gpu$xla.gpu.triton"')


def copies(text: str) -> list[str]:
    """Instructions of the entry computation that move data instead of computing."""
    entry = text[text.index("ENTRY") :]
    return re.findall(r"= \S+ (?:copy|slice|dynamic-slice|transpose|fusion)\(.*", entry)


def consumers(text: str, producer: str) -> list[str]:
    """The opcodes of the instructions that read `producer`."""
    entry = text[text.index("ENTRY") :]
    reads = [line for line in entry.splitlines() if re.search(rf"[(,] ?{re.escape(producer)}[,)]", line.split("metadata=")[0])]
    return [re.search(r"[\]})] ([a-z-]+)\(", line)[1] for line in reads]


def fused_buffer(text: str) -> str:
    """The one instruction that makes the gate GEMM's output."""
    (producer,) = re.findall(r"(%\S+) = bf16\[4,648\]", text[text.index("ENTRY") :])
    return producer


def struct(shape, dtype=jnp.bfloat16):
    """A shape with a dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


EVERY = [(n, *each) for n, narrow in zip(SAMPLES, cycle(("bfloat16", "float16")), strict=False)
         for each in (("pallas", "float32"), ("pallas", "bfloat16"), ("triton", narrow))]  # fmt: skip


@pytest.mark.parametrize(("name", "door", "dtype"), EVERY)
def test_every_kernel_compiles(mesh, name, door, dtype):
    """One kernel per launch, nothing else: an InOut operand that is donated is updated in place."""
    sample = replace(SAMPLES[name], dtype=dtype)
    fusion = DECLARATIONS[sample.fusion]
    schedule = sample.viewed().schedule
    given = sample.dtypes()
    shapes = [struct(sample.shapes[n], given[n]) for n in fusion.tensors]
    donate = tuple(i for i, s in enumerate(fusion.tensors.values()) if s.role == "InOut")
    face = op(fusion)

    def call(*xs):
        outs = face(*xs, **sample.params, implementation=door, schedule=schedule)
        if not isinstance(outs, tuple):
            return outs
        new = len(outs) - len(donate)  # JAX gives a donated buffer to the first output it fits
        return (*outs[new:], *outs[:new]) if len(donate) > 1 else outs[::-1]

    text = compiled(mesh, call, shapes, donate)
    assert kernels(text) == len(sample.viewed().programs)
    assert not copies(text)


def block(x, residual, weight, packed, down):
    """The shared expert's half of a MoE block on Views of one fused buffer."""
    hidden, residual = add_rms_norm(x, residual, weight, implementation="pallas")
    gates = gate_gemm(hidden, packed, implementation="pallas")
    activated = silu_and_mul(gates.gate_up, implementation="pallas")
    routed = topk_softmax(gates.router_logits, 10, implementation="pallas")
    shared = activated @ down
    return residual, shared_expert_combine(x, shared, gates.shared_gate, implementation="pallas"), routed


def gate_shapes():
    """The block's operands at one rank's sizes."""
    packed = jax.eval_shape(pack_gate, struct((128, 2048)), struct((512, 2048)), struct((1, 2048)))
    return [struct((4, 2048)), struct((4, 2048)), struct((2048,)), packed, struct((64, 2048))]


def test_views_make_no_copy(mesh):
    """Every strided reader takes the fused buffer itself: five fusions and the down projection, no slice, no copy."""
    text = compiled(mesh, block, gate_shapes(), donate=(1,))
    assert kernels(text) == 4 + len(SAMPLES["gate_gemm"].viewed().programs)
    assert consumers(text, fused_buffer(text)) == ["custom-call"] * 3


def fused_block(x, residual, weight, packed, down):
    """The same on the parts of a packed weight: norm, gates and activation in one fusion, down projection and sum in one."""
    hidden, residual, activated, logits, share = gate_block(x, residual, weight, *packed.parts, implementation="pallas")
    routed = topk_softmax(logits, 10, implementation="pallas")
    return down_combine(x, activated, down.T, share, implementation="pallas"), residual, hidden, routed


def test_parts_of_a_packed_weight_make_no_copy(mesh):
    """Every program reads the packed weight itself: no slice of it, and nothing between the kernels."""
    shapes = gate_shapes()
    text = compiled(mesh, lambda x, r, w, p, down: fused_block(x, r, w, p, view(down)), shapes, donate=(0, 1))
    launches = [len(SAMPLES[n].viewed().programs) for n in ("gate_block", "topk_softmax", "down_combine")]
    assert kernels(text) == sum(launches)
    assert not copies(text)


def test_a_slice_would_be_seen(mesh):
    """The check above is one that can fail: a slice in place of a View becomes an instruction of its own."""

    def sliced(x, packed):
        fused = gate_gemm(x, packed.weight, implementation="pallas")
        return silu_and_mul(fused[:, :128], implementation="pallas")

    text = compiled(mesh, sliced, [gate_shapes()[0], gate_shapes()[3]])
    assert consumers(text, fused_buffer(text)) == ["fusion"]


def test_output_view_is_written_in_place(mesh):
    """`out=View` of a donated base: one kernel, no copy of the base."""

    def into(base, gate_up):
        return silu_and_mul(gate_up, implementation="pallas", out=view(base)[:, 64:128])

    text = compiled(mesh, into, [struct((4, 256)), struct((4, 128))], donate=(0,))
    assert kernels(text) == 1
    assert not copies(text)


@pytest.mark.parametrize(("name", "roundings"), [("add_rms_norm", 1), ("gated_rms_norm", 1)])
def test_declared_roundings_survive(mesh, name, roundings):
    """XLA on GPU would drop a plain bfloat16 round trip; array evaluation's roundings are in the compiled program."""
    sample = SAMPLES[name]
    fusion = DECLARATIONS[sample.fusion]
    face = op(fusion)
    text = compiled(mesh, lambda *xs: face(*xs, implementation="xla"), [struct(s) for s in sample.shapes.values()])
    assert text.count("exponent_bits=8, mantissa_bits=7") >= roundings


def test_float32_contractions_are_ieee(mesh):
    """No TF32 in a float32 product, whichever implementation makes it."""
    shapes = [struct((4, 2048), "float32"), struct((648, 2048), "float32")]
    for implementation in ("pallas", "xla"):
        text = compiled(mesh, lambda x, w, i=implementation: gate_gemm(x, w, implementation=i), shapes)
        assert "tf32" not in text.lower()
        assert implementation == "pallas" or "operand_precision={highest,highest}" in text


def test_shard_map_with_its_check():
    """Two H200s, weights cut, the residual donated: JAX's check passes, and nothing is added between the kernels."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology="1x1x2")
    mesh = Mesh(np.array(topology.devices).reshape(-1), ("tp",))
    whole, cut = PartitionSpec(), PartitionSpec("tp")
    specs = (whole, whole, whole, cut, whole, whole)

    def block(*operands):
        return gate_block(*operands, implementation="pallas")

    shapes = [(4, 2048), (4, 2048), (2048,), (256, 2048), (512, 2048), (1, 2048)]
    given = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p)) for s, p in zip(shapes, specs, strict=True)]
    run = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=(whole, whole, PartitionSpec(None, "tp"), whole, whole))
    text = jax.jit(run, donate_argnums=1).lower(*given).compile().as_text()
    assert kernels(text) == len(SAMPLES["gate_block"].viewed().programs)
    assert "all-reduce" not in text


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives_run_the_kernels_once(mesh, mode):
    """A tangent or a gradient beside a value costs array evaluation and no further kernel."""
    shapes = [struct((4, 2048)), struct((4, 2048)), struct((2048,))]

    def call(x, residual, weight):
        return add_rms_norm(x, residual, weight, implementation="pallas")[0]

    def forward(*xs):
        return jax.jvp(call, xs, xs)

    def reverse(*xs):
        value, back = jax.vjp(call, *xs)
        return value, back(value)

    assert kernels(compiled(mesh, {"forward": forward, "reverse": reverse}[mode], shapes)) == 1
