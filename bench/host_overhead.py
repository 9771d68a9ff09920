"""What a call costs the host: moekit's function, its operator, a raw Triton launch of the same kernel, and FlashInfer.

    python bench/host_overhead.py [--calls 2000] [--json FILE]

All in one process, on tensors too small for the GPU to be the limit: the median over blocks of calls, each block timed by the
host clock with the queue drained before it. `raw triton` launches the kernel moekit emitted through `kernel[grid](...)`, into
outputs that exist; `+ empty` allocates them first, as the functions do. FlashInfer is there if it can be imported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import moekit.torch as mt
from bench.common import environment, write
from moekit.fusions import FUSIONS
from moekit.torch import launch
from moekit.torch.call import Call

BLOCK = 100  # calls between two looks at the clock: less than the driver's launch queue holds


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Host time of one call: the median over blocks."""
    for _ in range(50):
        call()
    blocks = []
    for _ in range(max(5, calls // BLOCK)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BLOCK):
            call()
        blocks.append((time.perf_counter() - begin) / BLOCK * 1e6)
    torch.cuda.synchronize()
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


def rows(calls: int) -> list[dict]:
    """One row per way of calling."""
    device = {"device": "cuda", "dtype": torch.bfloat16}
    x, residual, weight = torch.randn(16, 2048, **device), torch.randn(16, 2048, **device), torch.randn(2048, **device)
    gate_up, half = torch.randn(16, 1024, **device), torch.empty(16, 512, **device)
    logits = torch.randn(16, 512, **device)
    normed = (torch.empty_like(x), torch.empty_like(residual))
    norm_raw, norm_empty = raw("add_rms_norm", (x, residual, weight), {}, False)
    place_raw, place_empty = raw("add_rms_norm", (x, residual, weight), {}, True)
    silu_raw, silu_empty = raw("silu_and_mul", (gate_up,), {}, False)
    top_raw, top_empty = raw("topk_softmax", (logits,), {"k": 10, "renormalize": True, "nan_to_zero": False}, False)
    ways = {
        "add_rms_norm": {
            "raw triton": norm_raw,
            "raw triton + empty": norm_empty,
            "function": lambda: mt.add_rms_norm(x, residual, weight),
            "function, out=": lambda: mt.add_rms_norm(x, residual, weight, out=normed),
            "torch.ops": lambda: torch.ops.moekit.add_rms_norm(x, residual, weight),
        },
        "add_rms_norm_": {
            "raw triton": place_raw,
            "raw triton + empty": place_empty,
            "function": lambda: mt.add_rms_norm_(x, residual, weight),
            "torch.ops": lambda: torch.ops.moekit.add_rms_norm_(x, residual, weight),
        },
        "silu_and_mul": {
            "raw triton": silu_raw,
            "raw triton + empty": silu_empty,
            "function": lambda: mt.silu_and_mul(gate_up),
            "function, out=": lambda: mt.silu_and_mul(gate_up, out=half),
            "torch.ops": lambda: torch.ops.moekit.silu_and_mul(gate_up),
        },
        "topk_softmax": {
            "raw triton": top_raw,
            "raw triton + empty": top_empty,
            "function": lambda: mt.topk_softmax(logits, 10),
            "torch.ops": lambda: torch.ops.moekit.topk_softmax(logits, 10),
        },
    }
    try:
        import flashinfer

        ways["add_rms_norm_"]["flashinfer"] = lambda: flashinfer.gemma_fused_add_rmsnorm(x, residual, weight)
        ways["silu_and_mul"]["flashinfer"] = lambda: flashinfer.silu_and_mul(gate_up)
    except Exception as error:  # a broken installation is as good as none
        print(f"FlashInfer is not here: {type(error).__name__}: {error}")
    with torch.no_grad():
        return [
            {"op": op, "way": way, "us": round(microseconds(call, calls), 2)}
            for op, each in ways.items()
            for way, call in each.items()
        ]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/host_overhead.py needs a CUDA device")
    found = rows(options.calls)
    for row in found:
        print(f"{row['op']:16s} {row['way']:20s} {row['us']:8.2f} µs")
    if options.json:
        write(options.json, environment() | {"rows": found})


if __name__ == "__main__":
    main()
