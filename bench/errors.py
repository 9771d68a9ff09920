"""The worst error of every fusion, dtype and implementation that this machine can run, at the model's sizes.

    python bench/errors.py [--implementations triton,pallas] [--seeds 8] [--workers 2] [--json FILE]

Each figure is the largest over sizes and seeds: the error against the float64 reference in ulps of the output's dtype (of the
largest magnitude in the row, so that cancellation does not decide it; of the operands' dtype where the fusion rounds to that on
its way to a float32 output), and the ratio to the error bound's float32 noise
(see moekit.testing.bounds; the contract allows moekit.testing.constants).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common import environment, write
from bench.report import errors
from moekit.fusions import FUSIONS
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
    "gated_rms_norm": [{"T": 8, "V": 32, "D": 128}],
    "delta_rule_step": [{"T": 4, "K": 2, "V": 4, "Dk": 128, "Dv": 128}],
    "gate_projections": [{"T": 16, "D": 2048, "I": 64, "E": 512, "G": 1}],
    "down_combine": [{"T": 16, "I": 64, "H": 2048}],
    "expert_gate_up": [{"T": 4, "D": 2048, "I": 64, "E": 16, "K": 10}],
    "expert_down": [{"T": 4, "H": 2048, "I": 64, "E": 16, "K": 10}],
}


def worst(name: str, dtype: str, implementation: str, seeds: int) -> dict:
    """The worst error of one fusion, dtype and implementation."""
    fusion, found = FUSIONS[name], {"fusion": name, "dtype": dtype, "implementation": implementation}
    found |= {"ulps": 0.0, "ratio": 0.0, "problems": []}
    params = {"k": 10} if "k" in fusion.params else {}
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
    return found


def ulps(got: np.ndarray, want: np.ndarray, unit: str) -> float:
    """The largest error in ulps of `unit` at the row's largest magnitude; what is below all normal numbers may be zero."""
    flushed = (got == 0) & (np.abs(want) < float(ml_dtypes.finfo(got.dtype).smallest_normal))
    scale = ulp(np.abs(want).max(-1, keepdims=True), unit)
    return float(np.where(flushed, 0.0, np.abs(got.astype(np.float64) - want) / scale).max())


def rounds_inside(graph: Graph, dtype: str) -> bool:
    """Whether values are rounded to the operands' dtype on their way to an output: that is then no more exact in float32."""
    written = {w.value for w in graph.writes}
    return any(graph.nodes[i].op == "cast" and graph.nodes[i].dtype == dtype for i in graph.live() if i not in written)


def main() -> None:
    """Measure, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="eager,xla,pallas,interpret,numpy")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--json")
    args = parser.parse_args()
    names = args.implementations.split(",")
    result = environment() | {"implementations": names, "rows": []}
    tasks = list(itertools.product(FUSIONS, FLOATS, names, [args.seeds]))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for row in pool.map(worst, *zip(*tasks, strict=True)):
            result["rows"].append(row)
            said = f"{row['ulps']:.2f} ulps, ratio {row['ratio']:.2f}"
            print(row["fusion"], row["dtype"], row["implementation"], said, *row["problems"], flush=True)
    if args.json:
        write(args.json, result)
    print(errors(result))
    sys.exit(any(r["problems"] for r in result["rows"]))


if __name__ == "__main__":
    main()
