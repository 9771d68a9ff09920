"""How fast Triton multiplies matrices of a gate's shape on this GPU, without an epilogue, beside cuBLAS and moekit.

    python bench/gemm_limit.py [--tokens 256,1024,4096,16384] [--json FILE]

`triton` is the best of a few plain products (tensor descriptors, so TMA; persistent or not), and `triton, parts` the best of
those that add up the contracted axis part by part, as moekit does so that a row has the same bits whatever T: two accumulators,
and so no tile of 128 x 256 without spills. Neither has the shared gate's column. All sides of a row are replayed in turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).parents[1]))

import moekit.torch as mt
from bench.common import environment, write
from moekit.tune import timer

DEPTH, EXPERTS, PROGRAMS = 2048, 512, 132
WIDTHS = {648: (64, 4), 1544: (512, 4)}  # of the packed weight: I, and the parts that moekit's heuristic makes
PLAIN = ((128, 128, 4, True), (128, 256, 3, True), (128, 128, 4, False), (128, 256, 3, False))
IN_PARTS = ((128, 128, 4, False), (64, 128, 4, False), (128, 256, 3, False))


@triton.jit(do_not_specialize=["T"])
def product(
    x_ptr, w_ptr, out_ptr, T, N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out = x · wᵀ by descriptors; programs take every STEP-th tile (0: one each)."""
    tiles, last = tl.cdiv(T, ROWS) * (N // COLUMNS), D // BLOCK // PARTS - 1
    for tile in tl.range(tl.program_id(0), tiles if STEP else tl.program_id(0) + 1, STEP if STEP else 1, flatten=STEP > 0):
        row, column = tile // (N // COLUMNS) * ROWS, tile % (N // COLUMNS) * COLUMNS
        acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for k in range(D // BLOCK):
            acc = tl.dot(x_ptr.load([row, k * BLOCK]), w_ptr.load([column, k * BLOCK]).T, acc)
            if PARTS > 1:  # noqa: SIM102 (known to the compiler)
                if k % (last + 1) == last:
                    total = total + acc
                    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        out_ptr.store([row, column], (total if PARTS > 1 else acc).to(tl.bfloat16))


def by_triton(x: torch.Tensor, w: torch.Tensor, n: int, parts: int, rows: int, columns: int, stages: int, persistent: bool):
    """A call of the plain product, and what it writes."""
    out = torch.empty(len(x), n, device="cuda", dtype=x.dtype)
    given = [TensorDescriptor.from_tensor(t, [b, c]) for t, b, c in ((x, rows, 64), (w[:n], columns, 64), (out, rows, columns))]
    tiles = triton.cdiv(len(x), rows) * (n // columns)
    sizes = (len(x), n, DEPTH, parts, rows, columns, 64, PROGRAMS if persistent else 0)
    grid, options = (
        (min(PROGRAMS, tiles) if persistent else tiles,),
        {"num_warps": 8 if rows == 128 else 4, "num_stages": stages},
    )
    return lambda: product[grid](*given, *sizes, **options), out


def sides(width: int, tokens: int) -> dict[str, timer.Captured]:
    """Every side of one row, captured."""
    i, parts = WIDTHS[width]
    n = 2 * i + EXPERTS
    copies = min(48, timer.copies_needed(2 * (DEPTH * (tokens + width) + tokens * width)))
    drawn = [(torch.randn(tokens, DEPTH, device="cuda"), torch.randn(width, DEPTH, device="cuda")) for _ in range(copies)]
    pairs = [(x.bfloat16(), (w * DEPTH**-0.5).bfloat16()) for x, w in drawn]
    calls = {
        "cublas": [lambda x=x, w=w: torch.mm(x, w.t()) for x, w in pairs],
        "moekit gate_gemm": [lambda x=x, w=w: mt.gate_gemm(x, w) for x, w in pairs],
        "moekit gate_projections": [
            lambda x=x, w=w: mt.gate_projections(x, w[: 2 * i], w[2 * i : n], w[n : n + 1]) for x, w in pairs
        ],
    }
    wanted = pairs[0][0].float() @ pairs[0][1][:n].float().t()
    for kind, count, tiles in (("triton", 1, PLAIN), ("triton, parts", parts, IN_PARTS)):
        for tile in tiles:
            if n % tile[1] == 0:
                name = f"{kind} {tile[0]} x {tile[1]}{' persistent' * tile[3]}"
                made = [by_triton(x, w, n, count, *tile) for x, w in pairs]
                made[0][0]()
                torch.testing.assert_close(made[0][1].float(), wanted, rtol=2e-2, atol=2e-2)
                calls[name] = [call for call, _ in made]
    return {name: timer.capture(every, 1) for name, every in calls.items()}


def row(width: int, tokens: int) -> dict:
    """Times in microseconds; of Triton's own products the best, and which that was."""
    times = timer.replay(sides(width, tokens))
    found = {"width": width, "tokens": tokens}
    for kind in ("triton", "triton, parts"):
        best = min((n for n in times if n.startswith(f"{kind} ")), key=lambda n: times[n].us)
        found |= {kind: times[best].us, f"{kind}: tile": best.removeprefix(f"{kind} ")}
    return found | {name: t.us for name, t in times.items() if not name.startswith("triton")}


def main() -> None:
    """Print a table: microseconds, and TFLOP/s of the product."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", default="256,1024,4096,16384")
    options.add_argument("--json")
    given = options.parse_args()
    rows = [row(width, tokens) for width in WIDTHS for tokens in map(int, given.tokens.split(","))]
    names = ["cublas", "triton", "triton, parts", "moekit gate_gemm", "moekit gate_projections"]
    print("| 2048 to | T |", " | ".join(names), "| best tiles |")
    print("|---" * (len(names) + 3) + "|")
    for r in rows:
        rate = 2 * DEPTH * (2 * WIDTHS[r["width"]][0] + EXPERTS) * r["tokens"] / 1e6
        cells = [f"{r[n]:.2f} ({rate / r[n]:.0f})" for n in names]
        print(f"| {r['width']} | {r['tokens']} | {' | '.join(cells)} | {r['triton: tile']}; {r['triton, parts: tile']} |")
    if given.json:
        write(given.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
