"""On a GPU, `python -m pytest -m gpu tests/torch -q`: autograd, compile, graphs, streams; launches, memory, host time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moekit.torch as mt
from moekit.compile.rules import heuristic, row_classes
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.torch import launch, ops
from moekit.torch.call import Call
from tests.sizes import sizes_of

pytestmark = pytest.mark.gpu
CLOSE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
LAYOUTS = ("dense", "padded", "strided", "transposed", "transposed padded")
ROOT = Path(__file__).parents[2]


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def close(got, wanted, dtype="float32") -> None:
    for a, b in zip(as_tuple(got), as_tuple(wanted), strict=True):
        finite = b[b.isfinite()].abs() if b.is_floating_point() else b[:0]
        largest = finite.max().item() if finite.numel() else 0.0  # a sum's noise goes by its terms
        torch.testing.assert_close(a, b, rtol=CLOSE[dtype], atol=CLOSE[dtype] * max(1.0, largest))


def device_tensors(tensors, *args, device="cuda", **kwargs):
    return tensors(*args, device=device, **kwargs)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_agree_with_array_evaluation_on_both_ways(fused, params, tensors, dtype, layout):
    face = mt.op(FUSIONS[fused])
    for seed in range(3):
        operands = device_tensors(tensors, fused, dtype, layout, seed=seed)
        close(face(*operands, **params), face(*operands, **params, implementation="eager"), dtype)


def test_short_way_is_taken(tensors, monkeypatch):
    operands = device_tensors(tensors, "add_rms_norm")
    mt.add_rms_norm(*operands)
    monkeypatch.setattr(launch, "start", lambda *args: pytest.fail("the front door was used for a layout seen before"))
    mt.add_rms_norm(*(x.clone() for x in operands))
    torch.ops.moekit.add_rms_norm(*operands)


@pytest.mark.parametrize("layout", ["dense", "padded", "transposed"])
def test_opcheck(fused, params, tensors, layout):
    known = ops.registered(FUSIONS[fused])
    for overload in filter(None, (known.plain, known.in_place)):
        operands = device_tensors(tensors, fused, layout=layout)
        torch.library.opcheck(overload, (*operands, *params.values()))


def test_opcheck_with_gradients(fused, params, tensors):
    operands = [x.requires_grad_(x.is_floating_point()) for x in device_tensors(tensors, fused)]
    torch.library.opcheck(ops.registered(FUSIONS[fused]).plain, (*operands, *params.values()))


@pytest.mark.usefixtures("smooth")
def test_gradients_equal_those_on_the_cpu(fused, params, tensors):
    face, grads = mt.op(FUSIONS[fused]), []
    for device in ("cpu", "cuda"):
        operands = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors(fused, device=device)]
        sum(x.square().sum() for x in as_tuple(face(*operands, **params)) if x.is_floating_point()).backward()
        grads.append([x.grad.cpu() for x in operands if x.requires_grad])
    for there, here in zip(*grads, strict=True):
        largest = there.abs().max().item() if there.numel() else 0.0  # what little large terms leave is noise
        torch.testing.assert_close(here, there, rtol=1e-3, atol=max(1e-4, 1e-6 * largest))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(fused, params, tensors, mode):
    torch._dynamo.reset()
    face = mt.op(FUSIONS[fused])
    call = torch.compile(lambda *xs: face(*xs, **params), fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(4):
            operands = device_tensors(tensors, fused, seed=seed)
            close(call(*operands), face(*operands, **params))


def test_compiled_block_clones_nothing():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    weight, fused = torch.randn(256, device="cuda"), torch.randn(8, 640, device="cuda")
    x, residual = torch.randn(8, 256, device="cuda"), torch.randn(8, 256, device="cuda")

    def block(x, residual, fused, out):
        normed, _ = mt.add_rms_norm_(x, residual, weight)
        mt.silu_and_mul(fused[:, 64:576], out=out)
        return normed

    out, updated = torch.empty(8, 512, device="cuda")[:, :256], residual.clone()
    normed, code = run_and_get_code(torch.compile(block, fullgraph=True), x, updated, fused, out)
    close((normed, updated), mt.add_rms_norm(x, residual, weight))
    close(out, mt.silu_and_mul(fused[:, 64:576]))
    body = code[0][code[0].index("def call") :]
    assert "clone" not in body
    assert "copy_" not in body
    assert ".run(" not in body


def test_cuda_graph(fused, params, tensors):
    """Capture and replay of plain, in-place and out= forms; replays follow the contents of the operands."""
    face, known = mt.op(FUSIONS[fused]), ops.registered(FUSIONS[fused])
    in_place = mt.op(FUSIONS[fused], in_place=True)
    held = device_tensors(tensors, fused)
    state = tuple(x.clone() for x in held)
    outs = tuple(torch.empty_like(x) for x in as_tuple(face(*held, **params)))
    in_place(*(x.clone() for x in state), **params)
    face(*held, **params, out=outs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = as_tuple(face(*held, **params))
        face(*held, **params, out=outs)
        updated = as_tuple(in_place(*state, **params))
    for seed in (1, 2):
        fresh = device_tensors(tensors, fused, seed=seed)
        for mine, given, theirs in zip(held, state, fresh, strict=True):
            mine.copy_(theirs)
            given.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        wanted = as_tuple(face(*fresh, **params))
        for got in (plain, outs, updated):
            close(got, wanted)
    assert len(known.outputs) == len(plain)


def test_streams():
    """Each stream's work is its own: a call waits for its operands' stream only."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    weight = torch.randn(4096, device="cuda")
    results = []
    torch.cuda.synchronize()
    for n, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            x = torch.full((64, 4096), float(n + 1), device="cuda")
            residual = torch.zeros_like(x)
            for _ in range(50):
                _, residual = mt.add_rms_norm_(x, residual, weight)
            results.append(residual)
    torch.cuda.synchronize()
    for n, residual in enumerate(results):
        assert (residual == 50.0 * (n + 1)).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(fused, params, tensors):
    face = mt.op(FUSIONS[fused])
    for seed in range(3):
        operands = tensors(fused, device="cuda:1", seed=seed)
        got = as_tuple(face(*operands, **params))
        assert all(x.device == torch.device("cuda:1") for x in got)
        close(got, face(*operands, **params, implementation="eager"))
    assert torch.cuda.current_device() == 0


def test_inference_mode(fused, params, tensors):
    face = mt.op(FUSIONS[fused], in_place=True)
    with torch.inference_mode():
        for seed in range(3):
            operands = device_tensors(tensors, fused, seed=seed)
            wanted = face(*(x.clone() for x in operands), **params, implementation="eager")
            close(face(*operands, **params), wanted)


def test_vmap(tensors):
    x, residual, weight = device_tensors(tensors, "add_rms_norm")
    got = torch.vmap(mt.add_rms_norm, (0, 0, None))(x[:, None], residual[:, None], weight)
    close(tuple(y[:, 0] for y in got), mt.add_rms_norm(x, residual, weight))


def compiled_kernels() -> int:
    """How many kernels Triton holds for this process's programs."""
    return sum(len(caches[0]) for k in KERNELS for caches in k.device_caches.values())


KERNELS: list = []


@pytest.fixture
def count_kernels(monkeypatch):
    original = launch.kernel

    def kernel(program):
        found = original(program)
        if all(found is not k for k in KERNELS):
            KERNELS.append(found)
        return found

    KERNELS.clear()
    monkeypatch.setattr(launch, "_known", {})
    monkeypatch.setattr(launch, "kernel", kernel)


ODD = {"D": 72, "P": 88, "I": 24, "E": 40, "H": 88, "V": 3, "K": 3, "Dk": 8, "Dv": 40, "G": 8, "Q": 24, "L": 300,
       "C": 88, "S": 3, "R": 8, "N": 8, "J": 72, "M": 2, "Cq": 5, "Ck": 5, "Cv": 5, "Lr": 5, "Lc": 5}  # fmt: skip


@pytest.mark.parametrize("order", ["row-major", "transposed"])
def test_new_token_counts_compile_nothing(fused, params, order, count_kernels):
    """T = 1 … 300 at an odd size no other test has: a kernel of each launch for each class of rows and of strides."""
    from moekit.testing import operands

    sizes = sizes_of(FUSIONS[fused], ODD)
    face, seen = mt.op(FUSIONS[fused]), set()
    for tokens in range(1, 301):
        shapes = [x.shape for x in operands(FUSIONS[fused], {"T": tokens, **sizes}, "bfloat16").values()]
        dtypes = [
            {"float32": torch.float32, "int32": torch.int32}.get(
                t.dtypes[0] if "bfloat16" not in t.dtypes else "", torch.bfloat16
            )
            for t in FUSIONS[fused].tensors.values()
        ]
        made = [
            torch.zeros(*reversed(s), dtype=d, device="cuda").permute(*reversed(range(len(s))))
            if order == "transposed"
            else torch.zeros(s, dtype=d, device="cuda")
            for s, d in zip(shapes, dtypes, strict=True)
        ]
        seen.add(tuple(stride_class(s, 16 // x.element_size()) for x in made for s in x.stride()))
        face(*made, **params)
    declared = FUSIONS[fused].trace(example(FUSIONS[fused], sizes, "bfloat16", params))
    classes = sum(least <= 300 for least in row_classes(declared))
    assert len(seen) == 1 or order == "transposed"
    assert 1 <= compiled_kernels() <= len(seen) * classes * len(heuristic(declared).launches)


def stride_class(stride: int, unit: int) -> tuple[bool, ...]:
    """What a kernel is told of a stride: whether it is 1 or a multiple of 16 bytes, in units of which it is passed then, and
    what Triton sees of the number that is passed."""
    aligned = stride % unit == 0
    passed = stride // unit if aligned else stride
    return stride == 1, aligned, passed == 1, passed % 16 == 0


def test_kernels_persist(tmp_path):
    """A second process finds every kernel in Triton's cache."""
    script = (
        "import torch, moekit.torch as mt\n"
        "x = torch.ones(3, 208, device='cuda')\n"
        "mt.add_rms_norm(x, x.clone(), torch.ones(208, device='cuda')); mt.topk_softmax(x, 3); torch.cuda.synchronize()\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    listings = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=ROOT)
        listings.append(sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*.cubin")))
    assert listings[0] == listings[1]
    assert len(listings[0]) == 2


def rounded(tensors) -> int:
    """What the caching allocator takes for tensors: multiples of 512 bytes."""
    return sum(-(-x.numel() * x.element_size() // 512) * 512 for x in tensors)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_outputs_and_scratch_are_allocated(fused, params, tensors, in_place):
    """By the allocator's own statistics: bytes and number of allocations, first and later calls, and through torch.ops."""
    face, known = mt.op(FUSIONS[fused], in_place=in_place), ops.registered(FUSIONS[fused])
    operator = known.in_place if in_place and known.in_place is not None else known.plain
    named = dict(zip(FUSIONS[fused].tensors, device_tensors(tensors, fused), strict=True))
    made = Call(FUSIONS[fused], named, params, in_place, None, None).prepare()
    scratch = [made.memory[n] for n in made.scratch]
    between, between_bytes = len(scratch), rounded(scratch)
    del made, scratch
    for call in (lambda *xs: face(*xs, **params), lambda *xs: operator(*xs, *params.values())):
        call(*device_tensors(tensors, fused))
        for _ in range(2):
            outs = fresh = None  # the last turn's outputs are freed before the call, not during it
            operands = device_tensors(tensors, fused)
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()
            peak = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            outs = call(*operands)
            after = torch.cuda.memory_stats()
            fresh = [x for x in as_tuple(outs) if x is not None and all(x is not o for o in operands)]
            wanted = rounded(fresh)
            assert after["allocation.all.allocated"] - before["allocation.all.allocated"] == len(fresh) + between
            assert torch.cuda.memory_allocated() - peak == wanted
            assert torch.cuda.max_memory_allocated() - peak == wanted + between_bytes


def test_scratch_is_what_the_schedule_declares():
    from moekit.compile.schedule import Schedule

    x, packed = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (16, 64))
    schedule = Schedule.parse(
        "tile:D.part:1 tile:T:16 tile:P:32 loop:D:64 split:D:4 warps:4 stages:2 then loop:D.part:1 tile:T:1 tile:P:64 warps:1"
    )
    for _ in range(3):
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = mt.gate_gemm(x, packed, schedule=schedule)
        scratch = 4 * 16 * 64 * 4
        assert torch.cuda.max_memory_allocated() - base == scratch + rounded([out])
        assert torch.cuda.memory_allocated() - base == rounded([out])
        torch.testing.assert_close(out.float(), x.float() @ packed.float().T, rtol=2e-2, atol=2e-1)
        del out


def test_profiler_hooks_see_launches(tensors):
    """Proton and its like listen at Triton's front door; while one does, every call uses it."""
    from triton import knobs

    operands = device_tensors(tensors, "add_rms_norm")
    mt.add_rms_norm(*operands)
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        mt.add_rms_norm(*operands)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    mt.add_rms_norm(*operands)
    assert seen == ["add_rms_norm_kernel"]
