"""How long each fusion takes on this GPU, beside torch eager, torch.compile and the peers that are installed.

    python bench/fusions.py [--fusions …] [--tokens 1,16,64] [--schedule "…"] [--json FILE]

One process, CUDA graphs, inputs rotated over 180 MB; the ratio is ours / best other. Correctness stands beside each time: the
worst error over its bound (see moekit.testing.compare), which must be at most 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import triton

from moekit import __version__
from moekit import torch as mt
from moekit.compile.schedule import Schedule
from moekit.tune.timer import copies_needed, microseconds

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


def rows(t: int, *shape: int) -> torch.Tensor:
    """Random bfloat16 rows on the GPU."""
    return torch.randn(t, *shape, device="cuda", dtype=torch.bfloat16)


def rms_norm_eager(x, residual, weight):
    """add_rms_norm in torch, as Hugging Face writes it."""
    total = x + residual
    t = total.float()
    return (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())).to(x.dtype), total


def silu_eager(gate_up):
    """silu_and_mul in torch."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def topk_eager(logits, k):
    """topk_softmax in torch."""
    weights, ids = torch.topk(torch.softmax(logits.float(), -1), k)
    return weights / weights.sum(-1, keepdim=True), ids


def combine_eager(hidden, shared, gate):
    """shared_expert_combine in torch."""
    return hidden + torch.sigmoid(gate) * shared


def cases() -> dict[str, tuple[Callable, Callable, Callable, Callable]]:
    """Name → (inputs of T, ours, torch eager, bytes moved)."""
    found = {}
    for h in (2048, 4096):
        found[f"add_rms_norm {h}"] = (
            lambda t, h=h: (rows(t, h), rows(t, h), rows(1, h)[0]),
            lambda s: lambda x, r, w: mt.add_rms_norm_(x, r, w, out=x, schedule=s),
            rms_norm_eager,
            lambda t, h=h: 4 * t * h * 2,
        )
        found[f"shared_expert_combine {h}"] = (
            lambda t, h=h: (rows(t, h), rows(t, h), rows(t, 648)[:, 640:641]),
            lambda s: lambda a, b, g: mt.shared_expert_combine_(a, b, g, schedule=s),
            combine_eager,
            lambda t, h=h: 3 * t * h * 2,
        )
    for i in (64, 512, 1024):
        found[f"silu_and_mul {i}"] = (
            lambda t, i=i: (rows(t, 2 * i + 520)[:, : 2 * i],),
            lambda s: lambda x: mt.silu_and_mul(x, schedule=s),
            silu_eager,
            lambda t, i=i: 3 * t * i * 2,
        )
    for e, k in ((512, 10), (256, 8)):
        found[f"topk_softmax {e}/{k}"] = (
            lambda t, e=e: (rows(t, e + 136)[:, 128 : 128 + e],),
            lambda s, k=k: lambda x: mt.topk_softmax(x, k, schedule=s),
            lambda x, k=k: topk_eager(x, k),
            lambda t, e=e: t * e * 2,
        )
    for p in (648, 1544):
        found[f"gate_gemm {p}"] = (
            lambda t, p=p: (rows(t, 2048), rows(p, 2048)),
            lambda s: lambda x, w: mt.gate_gemm(x, w, schedule=s),
            lambda x, w: x @ w.T,
            lambda t, p=p: (t * 2048 + p * 2048 + t * p) * 2,
        )
    found["gated_rms_norm 4x128"] = (
        lambda t: (rows(t, 4, 128), rows(t, 4, 128), rows(1, 128)[0]),
        lambda s: lambda x, z, w: mt.gated_rms_norm(x, z, w, schedule=s),
        lambda x, z, w: (torch.nn.functional.rms_norm(x.float(), (128,), w.float()) * torch.nn.functional.silu(z.float())).to(
            x
        ),
        lambda t: 3 * t * 512 * 2,
    )
    found["delta_rule_step 4x128x128"] = (
        lambda t: (
            rows(t, 2, 128),
            rows(t, 2, 128),
            rows(t, 4, 128),
            rows(t, 4),
            rows(t, 4),
            rows(1, 4)[0].float(),
            rows(1, 4)[0].float(),
            torch.randn(t, 4, 128, 128, device="cuda"),
        ),
        lambda s: lambda *a: mt.delta_rule_step_(*a, schedule=s),
        None,
        lambda t: 2 * t * 4 * 128 * 128 * 4,
    )
    return found


def measure(name: str, tokens: int, schedule: Schedule | None, compiled: bool) -> dict:
    """Times in microseconds for one fusion and T."""
    make, ours, eager, moved = cases()[name]
    total = moved(tokens)
    sets = [make(tokens) for _ in range(min(copies_needed(total), max(2, int(8e9 // max(total, 1)))))]
    row = {"fusion": name, "T": tokens, "bytes": total, "ours": microseconds([lambda a=a: ours(schedule)(*a) for a in sets])}
    if eager is not None:
        row["eager"] = microseconds([lambda a=a: eager(*a) for a in sets[:40]])
    if eager is not None and compiled:
        fast = torch.compile(eager, dynamic=False)
        row["compile"] = microseconds([lambda a=a: fast(*a) for a in sets])
    row["TB/s"] = total / row["ours"] / 1e6
    return row


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fusions", default="")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--schedule", action="append", default=[])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moekit": __version__,
        "python": platform.python_version(),
        "command": sys.argv,
        "rows": [],
    }
    schedules = [Schedule.parse(s) for s in args.schedule] or [None]
    for name in cases():
        if args.fusions and not any(f in name for f in args.fusions.split(",")):
            continue
        for tokens in map(int, args.tokens.split(",")):
            for schedule in schedules:
                try:
                    row = measure(name, tokens, schedule, not args.no_compile)
                except Exception as error:
                    row = {"fusion": name, "T": tokens, "error": f"{type(error).__name__}: {error}"[:200]}
                row["schedule"] = str(schedule) if schedule else "default"
                result["rows"].append(row)
                shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
                print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
                torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
