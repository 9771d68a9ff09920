"""The worst error of every fusion, dtype and implementation that this machine can run, at the model's sizes.

    python bench/errors.py [--implementations triton,pallas] [--seeds 8] [--json FILE] [--markdown FILE]

Each figure is the largest over sizes and seeds: the error against the float64 reference in ulps of the output's dtype (of the
largest magnitude in the row, so that cancellation does not decide it), and the ratio to the error bound's float32 noise
(see moekit.testing.bounds; the contract allows moekit.testing.constants).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from moekit import __version__
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS
from moekit.testing import RUNNERS, Call, compare, operands
from moekit.testing.compare import ulp

SIZES = {
    "gate_gemm": [{"T": 16, "D": 2048, "P": 648}],
    "silu_and_mul": [{"T": 64, "I": 64}, {"T": 16, "I": 512}],
    "topk_softmax": [{"T": 64, "E": 512}, {"T": 64, "E": 60}],
    "shared_expert_combine": [{"T": 16, "H": 2048}],
    "add_rms_norm": [{"T": 16, "H": 2048}, {"T": 2, "H": 16384}],
    "gated_rms_norm": [{"T": 8, "V": 32, "D": 128}],
    "delta_rule_step": [{"T": 4, "K": 2, "V": 4, "Dk": 128, "Dv": 128}],
    "gate_projections": [{"T": 16, "D": 2048, "I": 64, "E": 512, "G": 1}],
    "gate_block": [{"T": 16, "D": 2048, "I": 64, "E": 512, "G": 1}],
    "down_combine": [{"T": 16, "I": 64, "H": 2048}],
}


def worst(name: str, dtype: str, implementation: str, seeds: int) -> dict:
    """The worst error of one fusion, dtype and implementation."""
    fusion, found = FUSIONS[name], {"ulps": 0.0, "ratio": 0.0, "problems": []}
    params = {"k": 10} if "k" in fusion.params else {}
    for sizes in SIZES[name]:
        for seed in range(seeds):
            values = operands(fusion, sizes, dtype, "normal", seed)
            outcome = RUNNERS[implementation](Call(fusion, values, params))
            result = compare(fusion, outcome.outputs, values, params, implementation=implementation)
            wanted = fusion.reference(**values, **fusion.bind_params(params))
            found["ratio"] = max(found["ratio"], result.worst)
            found["problems"] += result.problems
            for n, want in wanted.items():
                got = outcome.outputs[n]
                if got.dtype.kind != "i":
                    scale = ulp(np.abs(want).max(-1, keepdims=True), got.dtype.name)
                    found["ulps"] = max(found["ulps"], float((np.abs(got.astype(np.float64) - want) / scale).max()))
    return found


def table(result: dict) -> str:
    """The result as a Markdown table: a row per fusion and dtype, `ulps (ratio)` per implementation."""
    names = result["implementations"]
    lines = ["| fusion | dtype | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for name in FUSIONS:
        for dtype in FLOATS:
            cells = []
            for i in names:
                row = next(r for r in result["rows"] if (r["fusion"], r["dtype"], r["implementation"]) == (name, dtype, i))
                cells.append(f"{row['ulps']:.2f} ({row['ratio']:.2f})")
            lines.append(f"| {name} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict:
    """What the figures were made with."""
    found = {"moekit": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "triton", "jax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    """Measure, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="eager,xla,pallas,interpret,numpy")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    args = parser.parse_args()
    import jax

    result = {"versions": versions(), "device": jax.devices()[0].device_kind, "command": sys.argv[1:], "rows": []}
    result["implementations"] = args.implementations.split(",")
    for name in FUSIONS:
        for dtype in FLOATS:
            for implementation in result["implementations"]:
                row = {"fusion": name, "dtype": dtype, "implementation": implementation}
                row |= worst(name, dtype, implementation, args.seeds)
                result["rows"].append(row)
                print(
                    name,
                    dtype,
                    implementation,
                    f"{row['ulps']:.2f} ulps",
                    f"ratio {row['ratio']:.2f}",
                    *row["problems"],
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.markdown:
        Path(args.markdown).write_text(table(result))
    print(table(result))
    sys.exit(any(r["problems"] for r in result["rows"]))


if __name__ == "__main__":
    main()
