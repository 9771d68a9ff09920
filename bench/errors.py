"""The worst error of every fusion, dtype and implementation that this machine can run, at the model's sizes.

    python bench/errors.py [--implementations triton,pallas] [--seeds 8] [--workers 2] [--json FILE]

Each figure is the largest over sizes and seeds: the error against the float64 reference in ulps of the output's dtype (of the
largest magnitude in the row, so that cancellation does not decide it; of the operands' dtype where the fusion rounds to that on
its way to a float32 output), and the ratio to the error bound's float32 noise
(see moekit.testing.bounds; the contract allows moekit.testing.constants).
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import report, runner
from moekit.fusions import FUSIONS
from moekit.lang.arguments import PARAMETERS
from moekit.lang.dtypes import FLOATS
from moekit.lang.graph import Graph
from moekit.testing import Call, compare, operands, run
from moekit.testing.oracle import ulp

SIZES = {
    "gate_gemm": [{"T": 16, "D": 2048, "P": 648}],
    "silu_and_mul": [{"T": 64, "I": 64}, {"T": 16, "I": 512}],
    "topk_softmax": [{"T": 64, "E": 512}, {"T": 64, "E": 60}],
    "shared_expert_combine": [{"T": 16, "H": 2048}],
    "add_rms_norm": [{"T": 16, "H": 2048}, {"T": 2, "H": 16384}],
    "all_reduce_add_rms_norm": [{"T": 16, "H": 2048}],
    "gated_rms_norm": [{"T": 8, "V": 32, "D": 128}],
    "delta_rule_step": [{"T": 4, "K": 2, "V": 4, "Dk": 128, "Dv": 128}],
    "gate_projections": [{"T": 16, "D": 2048, "I": 64, "E": 512, "G": 1}],
    "down_combine": [{"T": 16, "I": 64, "H": 2048}],
    "expert_gate_up": [{"T": 4, "D": 2048, "I": 64, "E": 16, "K": 10}],
    "attention_decode": [{"T": 4, "K": 2, "G": 8, "L": 1024, "D": 256, "Dv": 256}],
    "expert_down": [{"T": 4, "H": 2048, "I": 64, "E": 16, "K": 10}],
    "experts": [{"T": 4, "D": 2048, "H": 2048, "I": 64, "E": 16, "K": 10}],
    "moe_align": [{"T": 64, "K": 10}],
}


def measure(name: str, dtype: str, implementation: str, seeds: int) -> Iterator[dict]:
    """The worst error of one fusion, dtype and implementation."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
    fusion, found = FUSIONS[name], {"ulps": 0.0, "ratio": 0.0, "problems": []}
    params = {n: x for n, x in PARAMETERS.items() if n in fusion.params}
    for sizes in SIZES[name]:
        for seed in range(seeds):
            values = operands(fusion, sizes, dtype, "normal", seed)
            outcome = run(implementation, Call(fusion, values, params))
            result = compare(fusion, outcome.outputs, values, params, implementation=implementation)
            wanted = fusion.reference(**values, **fusion.bind_params(params))
            found["ratio"] = max(found["ratio"], result.worst)
            found["problems"] += result.problems
            for n, want in wanted.items():
                if (got := outcome.outputs[n]).dtype.kind != "i":
                    unit = dtype if rounds_inside(Call(fusion, values, params).graph, dtype) else got.dtype.name
                    found["ulps"] = max(found["ulps"], ulps(got, want, unit))
    yield found


def ulps(got: np.ndarray, want: np.ndarray, unit: str) -> float:
    """The largest error in ulps of `unit` at the row's largest magnitude; what is below all normal numbers may be zero."""
    flushed = (got == 0) & (np.abs(want) < float(ml_dtypes.finfo(got.dtype).smallest_normal))
    scale = ulp(np.abs(want).max(-1, keepdims=True), unit)
    return float(np.where(flushed, 0.0, np.abs(got.astype(np.float64) - want) / scale).max())


def rounds_inside(graph: Graph, dtype: str) -> bool:
    """Whether values are rounded to the operands' dtype on their way to an output: that is then no more exact in float32."""
    written = {w.value for w in graph.writes}
    return any(graph.nodes[i].op == "cast" and graph.nodes[i].dtype == dtype for i in graph.live() if i not in written)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Every fusion, dtype and implementation."""
    for fusion, dtype, implementation in itertools.product(args.fusions, FLOATS, args.implementations):
        head = {"fusion": fusion, "dtype": dtype, "implementation": implementation}
        yield head, (fusion, dtype, implementation, args.seeds)


def end(result: dict) -> str:
    """The table; what broke the contract is named."""
    names = dict.fromkeys(row["implementation"] for row in result["rows"])
    result["implementations"] = [*names]
    broken = [f"{r['fusion']} {r['dtype']} {r['implementation']}: {p}" for r in result["rows"] for p in problems(r)]
    return "\n".join([report.errors(result), *broken])


def problems(row: dict) -> list[str]:
    """What is wrong with a row, be it that it was not measured."""
    return [row["problem"]] if "problem" in row else row["problems"]


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--fusions silu_and_mul --implementations eager --seeds 1",
    options=(
        runner.Option("fusions", tuple(SIZES)),
        runner.Option("implementations", ("eager", "xla", "pallas", "interpret", "numpy")),
        runner.Option("seeds", 8),
    ),
    gpu=False,
    patience=600,
    workers=2,
    end=end,
    columns=("ulps", "ratio", "problems"),
)

if __name__ == "__main__":
    sys.exit(any(problems(row) for row in runner.ask(QUESTION)["rows"]))
