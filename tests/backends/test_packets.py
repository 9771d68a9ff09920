"""Packets in PTX, as Triton and XLA compile them for an H200 without one: each a single access, all sent before any wait."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moekit.backends import triton as emitter
from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile.layouts import contiguous
from moekit.fusions import FUSIONS
from moekit.jax import launch
from moekit.torch.launch import kernel

from .samples import viewed

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

FUSION = FUSIONS["all_reduce_add_rms_norm"]
DATA = Path(__file__).parents[1] / "data" / "h200.textproto"
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}
CASES = [
    ("bfloat16", 2, 2048, None),
    ("bfloat16", 2, 2048, "tile:T:1 whole:H:2048 warps:4"),
    ("float32", 3, 50, "tile:T:4 whole:H:64"),
    ("float16", 8, 257, None),
    ("bfloat16", 2, 3, None),
]


def bound(dtype: str, ranks: int, width: int):
    """The graph of one rank, and its sizes."""
    shapes = {"partial": (6, width), "residual": (6, width), "weight": (width,)}
    binding = FUSION.bind(shapes, dict.fromkeys(shapes, dtype), FUSION.bind_params({"tp": ranks}))
    return FUSION.trace(binding), dict(binding.sizes)


def by_triton(dtype: str, ranks: int, width: int, schedule: str | None) -> tuple[str, t.TileProgram]:
    """The PTX for sm_90, launched dependently."""
    graph, sizes = bound(dtype, ranks, width)
    (program,) = plan(graph, Schedule.parse(schedule) if schedule else None, contiguous(graph, sizes)).programs
    args = emitter.arguments(program)
    params = {a.name: program.param(a.subject) for a in args if a.kind == "pointer"}
    pointers = {n: "*i64" if isinstance(p.layout, t.Mailbox) else POINTERS[p.dtype] for n, p in params.items()}
    kinds = {a.name: pointers.get(a.name, "i32") for a in args}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if a.name in pointers}
    source = ASTSource(kernel(program), {**kinds, "PDL": "constexpr"}, {"PDL": True}, aligned)
    options = {"num_warps": program.warps, "num_stages": program.stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    return built.asm["ptx"], program


def by_xla(dtype: str, ranks: int, width: int, schedule: str | None, folder: Path) -> tuple[str, t.TileProgram]:
    """The PTX of the Pallas kernel in a jitted function."""
    graph, sizes = bound(dtype, ranks, width)
    channel = {
        "tp_mail": t.Mailbox("tp_mail", ranks, width),
        "tp_epochs": t.Viewed("tp_epochs", (16,), (0,), (0,), (1,)),
    }
    made = plan(graph, Schedule.parse(schedule) if schedule else None, viewed(graph, sizes) | channel, sizes)
    (program,) = made.programs
    own = {n: (tuple(sizes[a] for a in graph.tensors[n].axes), jnp.dtype(dtype)) for n in ("partial", "residual", "weight")}
    kinds = own | {"tp_mail": ((4 * ranks + 4,), jnp.int32), "tp_epochs": ((16,), jnp.int32)}

    def run(*arrays):
        return launch.launch(made, dict(zip(kinds, arrays, strict=True)), {"out": own["partial"]}, sizes, {})

    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(topology.devices).reshape(-1), ("tp",))
    args = [jax.ShapeDtypeStruct(*kind, sharding=NamedSharding(mesh, PartitionSpec())) for kind in kinds.values()]
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(*args)
        lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"})
    (dumped,) = folder.glob("*.ptx")
    return dumped.read_text(), program


SEND = re.compile(r"@there st\.relaxed\.sys\.global(\.v2)?\.b64 \[(%\w+)\], (\{packet0, packet1\}|packet0);")
POLL = re.compile(r"POLL:.*?@more bra POLL;", re.S)
LATE = "atom.relaxed.sys.global.cas.b64"  # the first wait in vain is kept: later ones follow from it
LOAD = re.compile(r"@wait(\d+) ld\.relaxed\.sys\.global(\.v2)?\.b64 (\{packet\1_0, packet\1_1\}|packet\1_0), \[(%\w+)\];")


def accesses(program: t.TileProgram) -> tuple[int, int]:
    """How many of a packet's accesses a lane has for each rank, and of how many packets each is."""
    send = next(op for op in program.body if isinstance(op, t.Send))
    lanes = np.prod(program.block(program.ordered(send.at.axes))) // (32 * program.warps)
    return max(1, int(lanes)), send.words


@pytest.mark.parametrize("backend", ["triton", "xla"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])) + "-scheduled" * bool(case[3]))
def test_packets(backend, case, tmp_path):
    """All elements go to every rank in accesses of one packet or two, none is merged with another or left out; then each is
    waited for in a loop around its load."""
    ptx, program = by_triton(*case) if backend == "triton" else by_xla(*case, tmp_path)
    sends, polls = list(SEND.finditer(ptx)), list(POLL.finditer(ptx))
    lanes, words = accesses(program)
    assert words == (2 if case[2] > 3 else 1)
    loads = [load for poll in polls for load in LOAD.findall(poll[0])]
    assert len(sends) == len(loads) == lanes * case[1]
    assert len(loads) == len(polls) * min(4, lanes), "a lane waits for one packet after the other"
    assert {m[1] for m in sends} == ({".v2"} if words == 2 else {None})
    assert {load[1] for load in loads} == ({".v2"} if words == 2 else {""})
    assert len({m[2] for m in sends}) == len(sends), "two accesses go to one place"
    assert len({load[3] for load in loads}) == len(loads), "two accesses come from one place"
    assert len(LOAD.findall(ptx)) == len(loads), "a load left its loop"
    assert sends[-1].end() < polls[0].start(), "something is sent after a wait"
    relaxed, two = re.findall(r"(?:st|ld|atom)\.relaxed\.\S+", ptx), ".v2" * (words == 2)
    mail = {f"st.relaxed.sys.global{two}.b64", f"ld.relaxed.sys.global{two}.b64"}
    assert {*relaxed} == {*mail, "ld.relaxed.sys.global.b32", LATE}
    assert all(f"@wait0 {LATE}" in ptx[m.end() : m.end() + 400] for m in polls), "a wait that nobody hears of"
    assert all(poll[0].count(", other;") == min(4, lanes) * (words - 1) for poll in polls), "a packet's epoch is not looked at"
    if backend == "triton":
        assert ptx.index("griddepcontrol.wait") < sends[0].start()


@pytest.mark.parametrize("backend", ["triton", "xla"])
def test_epochs_are_read_before_they_are_kept(backend, tmp_path):
    """All threads pass a barrier between the load of a row's epoch and its store."""
    case = ("bfloat16", 2, 2048, None)
    ptx, _ = by_triton(*case) if backend == "triton" else by_xla(*case, tmp_path)
    after = ptx[[*POLL.finditer(ptx)][-1].end() :]
    kept = re.search(r"st\.global\.b32", after)
    assert kept
    assert "bar.sync" in after[: kept.start()]
