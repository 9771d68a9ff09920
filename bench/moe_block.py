"""The MoE block of one rank at the 80B's sizes, without the routed experts, fused and not, in PyTorch or JAX.

    python bench/moe_block.py --framework jax [--tokens 1,4,16,64,256] [--tp 8,1] [--part moe,gate] [--json FILE]

Timed as bench/fusions.py and bench/fusions_jax.py time a fusion: calls with operands and weights of their own, in one CUDA
graph or unrolled in one jit. Beside each time, how far its outputs are from float64 and how many rows choose the same experts.
`part`: `gate` is norm → gates → activation → router, `moe` adds the down-projection and the combine.
"""

import argparse
import sys
from collections.abc import Iterator

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import plots, runner, targets
from bench.cases import padded


def measure(framework: str, *case: object) -> list[dict]:
    """One row per way of computing it."""
    if framework == "torch":
        from bench import fusions as bench
    else:
        from bench import fusions_jax as bench
    return bench.measure(*case)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Part, ranks and tokens, the tokens fastest."""
    for part in args.part:
        for tp in args.tp:
            for t in args.tokens:
                head = {"case": f"{args.framework} {part} block, tp {tp}", "T": t, "dtype": args.dtype}
                yield head, (args.framework, f"{part}_block {padded(1024 // tp + 513)}", t, args.dtype, args.rounds)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--framework jax --tokens 2 --tp 8 --part gate",
    options=(
        runner.Option("framework", "torch", choices=("torch", "jax")),
        runner.Option("tokens", (1, 4, 16, 64, 256)),
        runner.Option("tp", (8, 1), "ranks that share the shared expert"),
        runner.Option("part", ("moe", "gate")),
        runner.DTYPE,
        runner.ROUNDS,
    ),
    patience=180,
    end=targets.told,
    plot=plots.times,
    columns=("us", "relative", "ids"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
