"""How long each fusion takes on this GPU, beside torch eager, torch.compile and every peer that is installed.

    python bench/fusions.py [--fusions NAME,…] [--tokens 1,16,64] [--dtype bfloat16] [--targets] [--seconds N] [--json FILE]

One process, CUDA graphs, operands rotated and the L2 filled with something else between replays (moekit.tune.timer); all
sides of a row are replayed in turn. Beside each time stands how right its outputs were. `--targets` runs the sizes that have
a target and prints whether each is met. A plot is written beside the JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import targets
from bench.cases import CASES, Case
from bench.common import environment, numbers, write
from bench.correctness import Checker
from bench.sides import Maker, sides
from moekit.tune.timer import Captured, capture, copies_needed, replay

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
LARGEST_BYTES = 12e9  # of all operands together
SLOW = ("eager",)  # sides with many kernels: fewer calls in their graphs
PEERS = ("sgl-kernel", "flashinfer", "flashinfer cuda", "liger", "quack", "vllm", "fla")


def measure(case: Case, tokens: int, dtype: torch.dtype, makers: dict[str, Maker], rounds: int) -> Iterator[dict]:
    """One row per side for a case and T: its time, its spread and its error, or why it could not run."""
    moved = case.moved(tokens, dtype.itemsize)
    count = min(copies_needed(moved), max(2, int(LARGEST_BYTES // moved)))
    sets = [case.make(tokens, dtype) for _ in range(count)]
    graphs: dict[str, Captured] = {}
    check, rows = Checker(case, sets[0]), {}
    for name, make in makers.items():
        row = {"case": case.name, "T": tokens, "dtype": str(dtype).removeprefix("torch."), "side": name}
        try:
            row |= check(make)
            graphs[name] = capture([make(o) for o in (sets[: max(2, count // 4)] if name in SLOW else sets)])
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows[name] = row
    for name, timing in replay(graphs, rounds).items():
        rows[name] |= {"us": round(timing.us, 3), "spread": round(timing.spread, 3)}
        rows[name] |= {"TB/s": round(moved / timing.us / 1e6, 4), "TFLOP/s": round(case.flops(tokens) / timing.us / 1e6, 2)}
    yield from rows.values()


def wanted(args: argparse.Namespace) -> dict[str, list[int]]:
    """Tokens by case, in the order asked for: those with a target, or all."""
    names = list(dict.fromkeys(n for f in args.fusions.split(",") for n in CASES if n.startswith(f)))
    given = numbers(args.tokens) if args.tokens else None
    if args.targets:
        chosen = {n: targets.tokens(n) for n in names}
        return {n: [t for t in ts if given is None or t in given] for n, ts in chosen.items()}
    return {n: given or list(TOKENS) for n in names}


def shown(rows: list[dict], best: float) -> str:
    """A line per row of a case and T: the times, best first."""
    parts = []
    for row in sorted(rows, key=lambda r: r.get("us", float("inf"))):
        if "us" not in row:
            parts.append(f"{row['side']}: {row['problem'][:90]}")
            continue
        right = [f"{k} {row[k]:.3g}" for k in ("error", "relative", "ids") if k in row]
        parts.append(f"{row['side']} {row['us']:.2f} ({', '.join(right)})")
    return f"{rows[0]['case']} T={rows[0]['T']} [{best:.0f} s]  " + " | ".join(parts)


def run(args: argparse.Namespace) -> dict:
    """Measure everything that was asked for, as long as there is time."""
    from bench.ceilings import ceilings

    begin, dtype = time.monotonic(), getattr(torch, args.dtype)
    result = environment() | {"ceilings": ceilings(), "rows": [], "left out": []}
    print(result["ceilings"], flush=True)
    for name, tokens in wanted(args).items():
        case = CASES[name]
        makers = sides(case, not args.no_compile)
        if args.targets:
            makers = {n: m for n, m in makers.items() if n in (*PEERS, *targets.sides(name))}
        for t in tokens:
            if case.moved(t, dtype.itemsize) * 2 > LARGEST_BYTES or time.monotonic() - begin > args.seconds:
                result["left out"].append(f"{name} T={t}")
                continue
            rows = list(measure(case, t, dtype, makers, args.rounds))
            result["rows"] += rows
            print(shown(rows, time.monotonic() - begin), flush=True)
            torch.cuda.empty_cache()
        if args.json:
            write(args.json, result)
    return result


def main() -> None:
    """Run, print, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusions", default="", help="cases whose names begin so, comma between them, in this order")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--targets", action="store_true", help="the sizes that have a target, and whether it is met")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no measurement after so long")
    parser.add_argument("--json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/fusions.py needs a CUDA device")
    with torch.no_grad():
        result = run(args)
    result["targets"] = targets.judge(result["rows"], result["ceilings"])
    print(targets.table(result["targets"]))
    if args.json:
        from bench.plots import times

        write(args.json, result)
        times(result, Path(args.json).with_suffix(".svg"))


if __name__ == "__main__":
    main()
