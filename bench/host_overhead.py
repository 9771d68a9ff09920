"""What a call costs the host: moekit's function, its operator, a raw Triton launch of the same kernel, and FlashInfer.

    python bench/host_overhead.py [--calls 2000] [--json FILE]

All in one process, on tensors too small for the GPU to be the limit: the median over blocks of calls, each block timed by the
host clock with the queue drained before it. `raw triton` launches the kernel moekit emitted through `kernel[grid](...)`, into
outputs that exist; `+ empty` allocates them first, as the functions do. FlashInfer is there if it can be imported.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

sys.path.insert(0, __file__.rpartition("/bench/")[0])

import moekit.torch as mt
from bench import runner
from bench.cases import DEVICE, rows
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.testing import others
from moekit.torch import launch
from moekit.torch.call import Call

OPS = {  # shapes of operands, and parameters
    "add_rms_norm": (((16, 2048), (16, 2048), (2048,)), ()),
    "silu_and_mul": (((16, 1024),), ()),
    "topk_softmax": (((16, 512),), (10,)),
}
FLASHINFER = {"add_rms_norm_": "gemma_fused_add_rmsnorm", "silu_and_mul": "silu_and_mul"}
BLOCK = 100  # calls between two looks at the clock: less than the driver's launch queue holds


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Host time of one call: the median over blocks."""
    block, drain = min(calls, BLOCK), torch.cuda.synchronize if DEVICE == "cuda" else int
    for _ in range(min(calls, 50)):
        call()
    blocks = []
    for _ in range(max(5, calls // BLOCK)):
        drain()
        begin = time.perf_counter()
        for _ in range(block):
            call()
        blocks.append((time.perf_counter() - begin) / block * 1e6)
    drain()
    return statistics.median(blocks)


def raw(name: str, operands: tuple, params: dict, in_place: bool) -> tuple[Callable, Callable]:
    """A raw launch of the kernel of a call, and one that allocates the outputs first."""
    fusion = FUSIONS[name]
    call = Call(fusion, dict(zip(fusion.tensors, operands, strict=True)), params, in_place, None, None)
    made = call.prepare()
    (one,) = made.launches
    kernel, program = launch.kernel(one.program), one.program
    pointers = [made.memory[n] for n in one.pointers]
    overlap = one.overlaps(pointers[0].device)
    options = {"num_warps": program.warps, "num_stages": program.stages, "PDL": overlap} | (
        {"launch_pdl": True} if overlap else {}
    )
    fresh = [one.pointers.index(made.targets[n]) for n in call.names if n not in call.outs]

    def bare():
        kernel[(one.count,)](*pointers, *one.integers, **options)

    def allocating():
        mine = list(pointers)
        for i in fresh:
            mine[i] = torch.empty(pointers[i].shape, dtype=pointers[i].dtype, device=pointers[i].device)
        kernel[(one.count,)](*mine, *one.integers, **options)

    return bare, allocating


def ways(op: str) -> dict[str, Callable]:
    """Every way of calling an op, on a few rows."""
    name, in_place = op.removesuffix("_"), op.endswith("_")
    shapes, more = OPS[name]
    operands = tuple(rows(*shape, dtype=torch.bfloat16) for shape in shapes)
    function, operator = getattr(mt, op), getattr(torch.ops.moekit, op)
    found = {}
    if DEVICE == "cuda":
        bound = FUSIONS[name].bind_params(dict(zip(FUSIONS[name].params, more, strict=False)))
        found["raw triton"], found["raw triton + empty"] = raw(name, operands, bound, in_place)
    found["function"] = lambda: function(*operands, *more)
    if not in_place and not more:
        out = function(*operands)
        found["function, out="] = lambda: function(*operands, out=out)
    found["torch.ops"] = lambda: operator(*operands, *more)
    if op in FLASHINFER:
        with contextlib.suppress(UnavailableError):
            theirs = getattr(others.module("flashinfer"), FLASHINFER[op])
            found["flashinfer"] = lambda: theirs(*operands)
    return found


@torch.no_grad()
def measure(op: str, calls: int) -> list[dict]:
    """One row per way of calling."""
    return [{"way": way, "us": round(microseconds(call, calls), 2)} for way, call in ways(op).items()]


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per op."""
    for op in args.ops:
        yield {"op": op}, (op, args.calls)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--calls 1",
    options=(
        runner.Option("ops", ("add_rms_norm", "add_rms_norm_", "silu_and_mul", "topk_softmax")),
        runner.Option("calls", 2000),
    ),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
