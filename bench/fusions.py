"""How long each fusion takes on this GPU, beside torch eager, torch.compile and every peer that is installed.

    python bench/fusions.py [--fusions NAME,…] [--tokens 1,16,64] [--dtype bfloat16] [--targets] [--seconds N] [--json FILE]

One process, CUDA graphs, operands rotated and the L2 filled with something else between replays (moekit.tune.timer); all
sides of a row are replayed in turn. Beside each time stands how right its outputs were. `gate_block` and `moe_block` are
several fusions one after the other (bench/moe_block.py). `--targets` runs the sizes that have a target and prints whether each
is met. Sizes whose operands do not fit are left out. A plot is written beside the JSON.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import plots, runner, targets
from bench.cases import CASES
from bench.correctness import Checker
from bench.device_torch import captured, replayed
from bench.sides import sides
from moekit.tune.timer import copies_needed

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
LARGEST_BYTES = 12e9  # of all operands together
SLOW = ("eager",)  # sides with many kernels: fewer calls in their graphs
PEERS = ("sgl-kernel", "flashinfer", "flashinfer cuda", "liger", "quack", "vllm", "fla", "flashinfer, bfloat16 state")


def named(prefixes: tuple[str, ...]) -> list[str]:
    """The cases whose names begin so, in the order asked for."""
    return list(dict.fromkeys(n for prefix in prefixes for n in CASES if n.startswith(prefix)))


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Tokens by case: all that were asked for, or those of them that have a target."""
    size = getattr(torch, args.dtype).itemsize
    for name in named(args.fusions):
        for t in targets.tokens(name) if args.targets else args.tokens:
            if t in args.tokens and CASES[name].moved(t, size) * 2 <= LARGEST_BYTES:
                head = {"case": name, "T": t, "dtype": args.dtype}
                yield head, (name, t, args.dtype, args.rounds, not args.no_compile, args.targets)


@torch.no_grad()
def measure(name: str, tokens: int, dtype: str, rounds: int, compiled: bool = True, only_targets: bool = False) -> list[dict]:
    """One row per side for a case and T: its time, its spread and its error, or why it could not run."""
    case, kind = CASES[name], getattr(torch, dtype)
    moved = case.moved(tokens, kind.itemsize)
    count = min(copies_needed(moved), max(2, int(LARGEST_BYTES // moved)))
    sets = [case.make(tokens, kind) for _ in range(count)]
    check, makers = Checker(case, sets[0]), sides(case, compiled)
    if only_targets:
        makers = {n: m for n, m in makers.items() if n in (*PEERS, *targets.sides(name))}

    def prepare(side: str) -> tuple[dict, object]:
        some = sets[: max(2, count // 4)] if side in SLOW else sets
        return check(lambda o: makers[side](o)()), captured([makers[side](o) for o in some])

    rows = runner.beside(makers, prepare, lambda graphs: replayed(graphs, rounds))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [row | case.rates(tokens, kind.itemsize, row.get("us")) for row in rows]


def begin(args: argparse.Namespace) -> dict:
    """What the machine itself can do."""
    if args.smoke:
        return {}
    from bench.ceilings import ceilings

    return {"ceilings": ceilings()}


SIZES = (
    runner.Option("fusions", ("",), "cases whose names begin so, in this order"),
    runner.Option("tokens", TOKENS),
    runner.DTYPE,
    runner.ROUNDS,
)
QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--fusions gate_block 648,silu_and_mul 64 --tokens 2 --no-compile",
    options=(
        *SIZES,
        runner.Option("targets", False, "the sizes that have a target, and whether it is met"),
        runner.Option("no-compile", False, "leave torch.compile out"),
    ),
    begin=begin,
    end=targets.told,
    plot=plots.times,
    columns=("us", "error", "relative", "ids"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
