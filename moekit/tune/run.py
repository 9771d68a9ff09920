"""Tuning fusions on the GPU at hand: operands, checks against the reference, times, and the table that results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

from moekit import __version__
from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import numpy_dtype
from moekit.testing import Call, compare, operands
from moekit.torch.face import op
from moekit.tune.search import Trial, best, search
from moekit.tune.table import graph_key
from moekit.tune.timer import copies_needed, microseconds

TOKENS = (1, 16, 64, 256, 4096)

# what a decode step of the published models has at tensor parallel 1 and 8
SIZES: Mapping[str, tuple[dict[str, int], ...]] = {
    "gate_gemm": ({"D": 2048, "P": 648}, {"D": 2048, "P": 1544}),
    "gate_projections": ({"D": 2048, "I": 64, "E": 512, "G": 1}, {"D": 2048, "I": 512, "E": 512, "G": 1}),
    "gate_block": ({"D": 2048, "I": 64, "E": 512, "G": 1}, {"D": 2048, "I": 512, "E": 512, "G": 1}),
    "down_combine": ({"I": 64, "H": 2048}, {"I": 512, "H": 2048}),
    "silu_and_mul": ({"I": 64}, {"I": 512}, {"I": 1024}),
    "topk_softmax": ({"E": 512}, {"E": 256}),
    "shared_expert_combine": ({"H": 2048}, {"H": 4096}),
    "add_rms_norm": ({"H": 2048}, {"H": 4096}),
    "gated_rms_norm": ({"V": 4, "D": 128}, {"V": 32, "D": 128}),
    "delta_rule_step": ({"K": 2, "V": 4, "Dk": 128, "Dv": 128}, {"K": 16, "V": 32, "Dk": 128, "Dv": 128}),
}


FLOAT32 = {"A_log", "dt_bias"}  # what the models keep in float32 whatever their dtype


def params_of(name: str, sizes: Mapping[str, int]) -> dict:
    """The static parameters a fusion is tuned with."""
    return {"k": 10 if sizes["E"] >= 512 else 8} if name == "topk_softmax" else {}


class Target:
    """One fusion at one set of static sizes and a dtype, on this GPU."""

    def __init__(self, name: str, sizes: Mapping[str, int], dtype: str, tokens: tuple[int, ...]):
        self.fusion, self.sizes, self.dtype, self.tokens = FUSIONS[name], dict(sizes), dtype, tokens
        self.params = params_of(name, sizes)
        self.call = op(self.fusion, in_place=any(s.role == "InOut" for s in self.fusion.tensors.values()))
        small = operands(self.fusion, {"T": 3, **self.sizes}, dtype, "normal", 1)
        small = {n: x.astype("float32") if n in FLOAT32 else x for n, x in small.items()}
        self.small = small
        self.graph = Call(self.fusion, small, self.params).graph

    def check(self, schedule: Schedule) -> str | None:
        """The first problem of a schedule's outputs on random operands, None if there is none."""
        call = Call(self.fusion, self.small, self.params)
        tensors = [self._tensor(x) for x in self.small.values()]
        got = op(self.fusion)(*tensors, **self.params, implementation="triton", schedule=schedule)
        outs = dict(zip(call.names, got if isinstance(got, tuple) else (got,), strict=True))
        arrays = {n: x.float().cpu().numpy().astype(numpy_dtype(call.graph.tensors[n].dtype)) for n, x in outs.items()}
        problems = compare(self.fusion, arrays, self.small, self.params, implementation="triton").problems
        return problems[0] if problems else None

    def measure(self, schedule: Schedule) -> list[float]:
        """Microseconds per call for each number of tokens."""
        return [self._time(t, schedule) for t in self.tokens]

    def _time(self, tokens: int, schedule: Schedule) -> float:
        shapes = {n: (tokens, *x.shape[1:]) if x.shape[:1] == (3,) else x.shape for n, x in self.small.items()}
        total = sum(x.itemsize * torch.Size(shapes[n]).numel() for n, x in self.small.items())
        sets = [
            [torch.randn(shapes[n], device="cuda").to(getattr(torch, x.dtype.name)) for n, x in self.small.items()]
            for _ in range(min(copies_needed(total), 100))
        ]
        return microseconds([lambda a=a: self.call(*a, **self.params, schedule=schedule) for a in sets], replays=10)

    @staticmethod
    def _tensor(x) -> torch.Tensor:
        return torch.from_numpy(x.astype("float32")).to(getattr(torch, x.dtype.name)).cuda()


def tune(
    name: str, sizes: Mapping[str, int], dtype: str, seconds: float, progress: Callable[[Trial, float], None]
) -> tuple[str, Trial, list[Trial]]:
    """The graph key, the best trial and all trials for one fusion."""
    target = Target(name, sizes, dtype, TOKENS)
    trials = search(target.graph, target.measure, target.check, seconds, progress)
    return graph_key(target.graph), best(trials), trials


def write(path: Path, found: Mapping[str, Trial]) -> None:
    """The table of a device as JSON, with what made it; entries within 2 % of the heuristic are left to it."""
    worth = {k: str(t.schedule) for k, t in sorted(found.items()) if t.ratio < 0.98}
    kept = json.loads(path.read_text())["schedules"] if path.is_file() else {}
    kept = {k: s for k, s in kept.items() if k not in found}
    made = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moekit": __version__,
    }
    ratios = {k: round(t.ratio, 3) for k, t in sorted(found.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"made with": made, "time over the heuristic's": ratios, "schedules": dict(sorted((kept | worth).items()))}
    path.write_text(json.dumps(text, indent=1) + "\n")
