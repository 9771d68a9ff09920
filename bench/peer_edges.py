"""What peers' kernels do at the edge of what they document: each case in a process of its own, which may die of it.

    python bench/peer_edges.py [--only PREFIX] [--json FILE]

A case is ok or WRONG, with its relative error against float64, or raised, with the error: whether a check refused it, or its
launch failed, the text tells. Cases call the functions of `moekit.testing.others`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moekit.files import write_text
from moekit.testing import others

ENOUGH = 0.01  # relative error in the 2-norm: three roundings to bfloat16 are below it, and what is wrong is far above
RESULT = "RESULT "


def values(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """Standard normal numbers on the GPU, the same for one shape and seed."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(getattr(torch, dtype))


def verdict(got: Any, want: Any) -> str:
    """One word and the relative error; what is not finite (not written, too) counts as 1e4, unless NaN is what it should be."""
    import torch

    if got.is_cuda:
        torch.cuda.synchronize()
    got = torch.where(want.isnan(), 0.0, torch.nan_to_num(got.double(), 1e4, 1e4, -1e4))
    want = torch.nan_to_num(want)
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return f"{'ok' if error < ENOUGH else 'WRONG'}, relative error {error:.2g}"


def silu(kernel: str, gate_up: Any) -> str:
    """silu·mul of `gate_up` into an output of NaN."""
    import torch

    gate, up = gate_up.double().chunk(2, -1)
    out = torch.full((gate_up.shape[0], gate_up.shape[1] // 2), float("nan"), device=gate_up.device, dtype=gate_up.dtype)
    getattr(others, kernel)(gate_up, out)
    return verdict(out, torch.nn.functional.silu(gate) * up)


def norm(kernel: str, x: Any, residual: Any, weight: Any) -> str:
    """The zero-centred add-RMSNorm."""
    import torch

    total = x.double() + residual.double()
    want = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight.double())
    got = getattr(others, kernel)(x, residual, weight, 1e-6, 1.0) or (x, residual)
    return f"out {verdict(got[0], want)}; residual {verdict(got[1], total)}"


def topk(kernel: str, logits: Any, k: int = 10) -> str:
    """The router: how many rows have other ids than a stable sort, ids out of range, or an id twice."""
    import torch

    share = torch.softmax(logits.double(), -1)
    want, order = (x[:, :k] for x in share.sort(dim=-1, descending=True, stable=True))
    weights = torch.full((logits.shape[0], k), float("nan"), device=logits.device)
    ids = torch.full((logits.shape[0], k), -7, device=logits.device, dtype=torch.int32)
    third = (ids.clone(),) if kernel.startswith("vllm") else ()
    getattr(others, kernel)(logits, weights, ids, *third, True)
    said = verdict(weights, want / want.sum(-1, keepdim=True))
    different = int((ids != order).any(-1).sum())
    outside = int(((ids < 0) | (ids >= logits.shape[1])).any(-1).sum())
    twice = int((ids.sort(-1)[0].diff(dim=-1) == 0).any(-1).sum())
    counts = f"of {len(ids)} rows {different} have other ids, {outside} ids out of range, {twice} an id twice"
    return f"weights {said}; {counts}; first {ids[:1, :4].tolist()} for {order[:1, :4].tolist()}, {weights[:1, :2].tolist()}"


def softplus(a: float, A_log: float) -> str:
    """The decay of fla's delta rule in float32, for one gate: its relative error beside float64."""
    import math

    import torch

    q, v, gates = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.full((1, 1), a)
    zero, state = torch.zeros(1), torch.ones(1, 1, 16, 16)
    operands = [t.cuda() for t in (q, q, v, gates, gates, zero + A_log, zero, state)]
    new = float(others.fla_delta_rule_step(*operands)[1].double().mean())
    want = math.exp(-math.exp(A_log) * math.log1p(math.exp(a)))
    return f"decay {new:.9g} for {want:.9g}, relative error {abs(new / want - 1):.2g}"


CASES: dict[str, Callable[[], str]] = {}


def _silu_cases(kernel: str) -> dict[str, Callable[[], str]]:
    check = functools.partial(silu, kernel)
    return {
        "rows_of_648": lambda: check(values(5, 648)[:, :128]),
        **{f"I_{i}": lambda i=i: check(values(5, 2 * i)) for i in (4, 12, 20, 36, 64, 100, 516)},
        "no_tokens": lambda: check(values(0, 128)),
        "float32": lambda: check(values(5, 128, dtype="float32")),
        "gates_to_-200": lambda: check(values(5, 128) * 60),
    }


def _norm_cases(kernel: str) -> dict[str, Callable[[], str]]:
    def check(rows: int, width: int, pitch: int = 0, step: int = 1, dtype: str = "bfloat16") -> str:
        shape, used = (rows, pitch or width * step), slice(0, width * step, step)
        x, residual = (values(*shape, dtype=dtype, seed=seed)[:, used] for seed in (1, 2))
        return norm(kernel, x, residual, values(width, dtype=dtype))

    return {
        "contiguous": lambda: check(9, 2048),
        "rows_of_2056": lambda: check(9, 2048, 2056),
        "rows_of_2049": lambda: check(9, 2048, 2049),
        "columns_apart": lambda: check(9, 2048, step=2),
        "H_37": lambda: check(9, 37),
        "no_tokens": lambda: check(0, 2048),
        "T_70000": lambda: check(70000, 64),
        "float32": lambda: check(9, 2048, dtype="float32"),
    }


def _topk_cases(kernel: str) -> dict[str, Callable[[], str]]:
    def full(x: float, at: float | None = None) -> Any:
        import torch

        rows = torch.full((4, 512), x, device="cuda")
        rows[:, 77] = x if at is None else at
        return rows.bfloat16()

    check = functools.partial(topk, kernel)
    return {
        "contiguous": lambda: check(values(64, 512)),
        "rows_of_648": lambda: check(values(64, 648)[:, 128:640]),
        "rows_of_64_E_60": lambda: check(values(64, 64)[:, :60], 4),
        "E_60": lambda: check(values(64, 60), 4),
        "E_1023_float32": lambda: check(values(64, 1023, dtype="float32"), 8),
        "ties": lambda: check((values(64, 512) * 2).round()),
        "ties_E_60": lambda: check((values(64, 60) * 2).round(), 4),
        "rows_of_nan": lambda: check(full(float("nan"))),
        "rows_of_-inf": lambda: check(full(-float("inf"))),
        "one_finite": lambda: check(full(-float("inf"), 1.0)),
        "no_tokens": lambda: check(values(0, 512)),
        "k_is_E": lambda: check(values(9, 16), 16),
    }


def _register() -> None:
    makers: dict[Callable, tuple[str, ...]] = {
        _silu_cases: ("flashinfer_silu_and_mul", "sgl_silu_and_mul"),
        _norm_cases: ("flashinfer_add_rms_norm", "flashinfer_cuda_add_rms_norm", "sgl_add_rms_norm", "liger_add_rms_norm"),
        _topk_cases: ("sgl_topk_softmax", "vllm_topk_softmax"),
    }
    for make, kernels in makers.items():
        for kernel in kernels:
            CASES.update({f"{kernel} {name}": case for name, case in make(kernel).items()})
    for a, A_log in ((-4.375, 4.6875), (-8.0, 2.75), (-8.0, 0.0)):
        CASES[f"fla_delta_rule_step softplus_a_{a}_A_log_{A_log}"] = functools.partial(softplus, a, A_log)


_register()


def run_here(name: str) -> None:
    """Run one case and end the process, whatever state the device is in."""
    try:
        print(RESULT + CASES[name]())
    except Exception as error:
        print(f"{RESULT}raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    sys.stdout.flush()
    os._exit(0)


def run_apart(name: str) -> str:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--here", name]
    try:
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return "did not end in 120 seconds"
    found = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    return found[0].removeprefix(RESULT) if found else f"died with exit code {ended.returncode}"


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases that begin with this")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.here)
    names = [n for n in CASES if n.startswith(options.only)]
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(names, pool.map(run_apart, names), strict=True))
    for name, said in found.items():
        print(f"{name}: {said}")
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
