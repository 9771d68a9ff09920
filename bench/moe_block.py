"""The MoE block of one rank at the 80B's sizes, without the routed experts, fused and not, in PyTorch and JAX.

    python bench/moe_block.py [--tokens 1,4,16,64,256] [--tp 8,1] [--part moe,gate] [--framework torch,jax] [--json FILE]

Layers with weights of their own, one after the other. PyTorch: 48 in one CUDA graph. JAX: 24 unrolled in one jit, by the
device's clock (bench/device_jax.py). µs per layer; beside each, how far one layer is from float64 and how many rows choose the
same experts. `part`: `gate` is norm → gates → activation → router, `moe` adds the down-projection and the combine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import layer, targets
from bench.cases import rows
from bench.child import Child
from bench.common import environment, numbers, write
from bench.correctness import array
from bench.layer import Sizes
from bench.plots import times
from moekit.lang.dtypes import round_to
from moekit.tune.timer import capture, replay

LAYERS = 48
CHECKED = 8  # rows


def judged(got: list[np.ndarray], wanted: list[np.ndarray], part: str) -> dict[str, float]:
    """The largest relative error of the float outputs, and the share of rows with the reference's experts."""
    found = {"relative": 0.0}
    for i, (mine, want) in enumerate(zip(got, wanted, strict=True)):
        if mine.dtype.kind == "i":
            found["ids"] = float((np.sort(mine, -1) == np.sort(want, -1)).all(-1).mean())
        elif i or part == "moe":  # the gate part leaves x normalised
            found["relative"] = max(found["relative"], float(np.linalg.norm(mine - want) / np.linalg.norm(want)))
    return found


def in_torch(sizes: Sizes, tokens: int, dtype: torch.dtype, part: str, rounds: int) -> Iterator[dict]:
    """One row per way of computing it in PyTorch."""
    stack = [layer.weights(sizes, dtype) for _ in range(LAYERS)]
    x, residual = (rows(tokens, sizes.hidden, dtype=dtype) for _ in range(2))
    names = dict(zip(("gate_up", "router", "shared_gate"), map(array, stack[0]["gates"]), strict=True))
    named = names | {n: array(stack[0][n]) for n in ("norm", "down")}
    wanted = reference_of(named, array(x[:CHECKED]), array(residual[:CHECKED]), sizes)
    graphs, found = {}, {}
    for name, one in layer.layers().items():
        row = {"side": name}
        try:
            got = one(stack[0], x.clone(), residual.clone(), sizes.k, part)
            row |= judged([array(g[:CHECKED]) for g in got], wanted, part)
            graphs[name] = capture([chained(one, stack, x.clone(), residual.clone(), sizes.k, part)])
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found[name] = row
    for name, timing in replay(graphs, rounds).items():
        found[name] |= {"us": round(timing.us / LAYERS, 3), "spread": round(timing.spread / LAYERS, 3)}
    yield from found.values()


def chained(one: Callable, stack: list[dict], x, residual, k: int, part: str) -> Callable:
    """A call that goes through all layers and returns what each would hand to the experts."""

    def call():
        a, b, kept = x, residual, []
        for w in stack:
            a, b, *rest = one(w, a, b, k, part)
            kept.append(rest)
        return a, b, kept

    return call


def reference_of(w: dict[str, np.ndarray], x: np.ndarray, residual: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
    """float64 of the first rows."""
    rounding = partial(round_to, dtype=x.dtype.name)
    return layer.reference(w, x, residual, sizes.k, rounding)


def in_jax(sizes: Sizes, tokens: int, dtype: str, part: str, rounds: int) -> Iterator[dict]:
    """One row per way of computing it in JAX."""
    import jax

    from bench import device_jax, layer_jax

    keys = jax.random.split(jax.random.key(7), layer_jax.LAYERS + 2)
    stack = [layer_jax.weights(sizes, dtype, k) for k in keys[:-2]]
    x, residual = (jax.random.normal(k, (tokens, sizes.hidden)).astype(dtype) for k in keys[-2:])
    named = dict(zip(("gate_up", "router", "shared_gate"), map(np.asarray, stack[0]["gates"]), strict=True))
    named |= {n: np.asarray(stack[0][n]) for n in ("norm", "down")}
    wanted = reference_of(named, np.asarray(x[:CHECKED]), np.asarray(residual[:CHECKED]), sizes)
    found, chains = {}, {}
    built = layer_jax.programs(layer_jax.layers(), stack, x, residual, sizes.k, part)
    for name in layer_jax.layers():
        found[name] = {"side": name}
        try:
            one, all_of_them = (device_jax.made(built[name, n]) for n in (1, len(stack)))
            got = one(stack[0], x, residual)
            found[name] |= judged([np.asarray(g[:CHECKED]) for g in got], wanted, part)
            chains[name] = partial(all_of_them, stack, x, residual)
        except Exception as error:
            found[name]["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for name, timing in device_jax.timed(chains, len(stack), rounds).items():
        found[name] |= timing
    yield from found.values()


def main() -> None:
    """Run, print, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--tp", default="8,1")
    parser.add_argument("--part", default="moe,gate")
    parser.add_argument("--framework", default="torch,jax")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no measurement after so long")
    parser.add_argument("--json")
    args = parser.parse_args()
    child = Child(in_jax)  # JAX's profiler and PyTorch's CUDA context are not for one process
    begin, result = time.monotonic(), environment() | {"rows": [], "left out": []}
    for framework in args.framework.split(","):
        for part in args.part.split(","):
            for tp in numbers(args.tp):
                for t in numbers(args.tokens):
                    head = {"case": f"{framework} {part} block, tp {tp}", "T": t, "dtype": args.dtype}
                    if time.monotonic() - begin > args.seconds:
                        result["left out"].append(head)
                        continue
                    if framework == "torch":
                        with torch.no_grad():
                            measured = list(in_torch(Sizes(tp), t, getattr(torch, args.dtype), part, args.rounds))
                        torch.cuda.empty_cache()
                    else:
                        measured = child.rows(Sizes(tp), t, args.dtype, part, args.rounds)
                    found = [head | row for row in measured]
                    result["rows"] += found
                    fastest = sorted(found, key=lambda r: r.get("us", float("inf")))
                    print(*head.values(), f"[{time.monotonic() - begin:.0f} s]", " | ".join(map(shown, fastest)), flush=True)
                    if args.json:
                        write(args.json, result)
    child.close()
    result["targets"] = targets.judge(result["rows"], {})
    print(targets.table(result["targets"]))
    if args.json:
        write(args.json, result)
        times(result, Path(args.json).with_suffix(".svg"))


def shown(row: dict) -> str:
    """A side, its time and how right it is."""
    if "us" not in row:
        return f"{row['side']}: {row['problem'][:90]}"
    return f"{row['side']} {row['us']:.2f} (relative {row['relative']:.1e}, ids {row['ids']:.2f})"


if __name__ == "__main__":
    main()
