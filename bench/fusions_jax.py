"""How long each fusion takes in JAX: moekit's kernels and XLA's, by the device's clock over a chain of calls in one jit.

    python bench/fusions_jax.py [--fusions NAME,…] [--tokens 1,64,4096] [--seconds N] [--json FILE]

Each call of a chain has operands of its own and waits for the one before; the L2 is filled with something else before a chain
runs (bench/device_jax.py). Operands are contiguous; those that a fusion updates are donated. Beside each time stands how right
its outputs were, as in bench/fusions.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import cases
from bench.cases import CASES, Case, Operands
from bench.child import Child
from bench.common import environment, numbers, write
from bench.correctness import Checker
from bench.device_jax import compiled, made, timed
from bench.plots import times
from moekit import jax as mj
from moekit.fusions import FUSIONS

LENGTH = 24
LARGEST_BYTES = 4e9
SIDES = {"moekit (jax)": None, "xla": "xla"}
UPDATED = {
    "add_rms_norm": ("residual", 1),
    "shared_expert_combine": ("hidden", 0),
    "delta_rule_step": ("state", 1),
    "down_combine": ("hidden", 0),
}


def to_jax(x: torch.Tensor) -> jax.Array:
    """A tensor's numbers as a contiguous JAX array."""
    name = str(x.dtype).removeprefix("torch.")
    whole = x.float() if x.dtype.is_floating_point else x
    return jnp.asarray(whole.cpu().numpy()).astype(name)


def to_torch(x: jax.Array) -> torch.Tensor:
    """The other way, on the CPU."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return torch.from_numpy(np.array(x.astype("float32"))).to(getattr(torch, x.dtype.name))
    return torch.from_numpy(np.array(x))


def call_of(case: Case, implementation: str | None) -> Callable:
    """The fusion as a function of its operands that returns a tuple."""

    def call(*operands):
        got = getattr(mj, case.fusion)(*operands, **case.params, implementation=implementation)
        return got if isinstance(got, tuple) else (got,)

    return call


class Chain:
    """A program of one call of a fusion per set of operands, each waiting for the one before.

    What the fusion updates is donated, and the next run begins with what it became, as in a decode step; it is what the program
    returns first, since JAX gives a donated buffer to the first output that it fits.
    """

    def __init__(self, case: Case, one: Callable, sets: Sequence[dict[str, jax.Array]]):
        self.updated, self.place = UPDATED.get(case.fusion, (None, 0))
        self.fixed = [{n: x for n, x in s.items() if n != self.updated} for s in sets]
        self.state = [jnp.copy(s[self.updated]) if self.updated else () for s in sets]
        self.names, self.one = list(sets[0]), one
        self.program = jax.jit(self._run, donate_argnums=1)

    def _run(self, fixed, state):
        before, kept, after = (), [], []
        for given, old in zip(fixed, state, strict=True):
            (given, old), before = lax.optimization_barrier(((given, old), before))
            named = given | ({self.updated: old} if self.updated else {})
            before = self.one(*(named[n] for n in self.names))
            kept.append(tuple(x for i, x in enumerate(before) if not self.updated or i != self.place))
            after.append(before[self.place] if self.updated else ())
        return after, kept

    def lower(self) -> jax.stages.Lowered:
        """The program for these operands, to be compiled."""
        return self.program.lower(self.fixed, self.state)

    def __call__(self):
        """Run the program: the new values of what is updated, and the other outputs of every call."""
        self.state, kept = self.program(self.fixed, self.state)
        return self.state, kept


def measured(name: str, tokens: int, dtype: str, rounds: int) -> Iterator[dict]:
    """One row per side of a case, whose numbers are drawn on the CPU: this is a process of JAX's."""
    cases.DEVICE = "cpu"
    yield from measure(CASES[name], tokens, getattr(torch, dtype), rounds)


def measure(case: Case, tokens: int, dtype: torch.dtype, rounds: int) -> Iterator[dict]:
    """One row per side. Each call of a chain has the first one's numbers, moved on by one element."""
    moved = case.moved(tokens, dtype.itemsize)
    length = max(2, min(LENGTH, int(LARGEST_BYTES // moved)))
    first: Operands = case.make(tokens, dtype)
    roll, given = jax.jit(jnp.roll), {n: to_jax(x) for n, x in first.items()}
    sets = [{n: roll(x, i) for n, x in given.items()} for i in range(length)]
    check, chains, found, lowered = Checker(case, first), {}, {}, {}
    for name, implementation in SIDES.items():
        one = call_of(case, implementation)
        chains[name] = Chain(case, one, sets)
        lowered[name] = partial(jax.jit(one).lower, *sets[0].values())
    single, every = compiled(lowered, at_once=1), compiled({name: chain.lower for name, chain in chains.items()})
    for name in SIDES:
        row = {"case": case.name, "T": tokens, "dtype": str(dtype).removeprefix("torch."), "side": name}
        try:
            got = tuple(to_torch(x) for x in made(single[name])(*sets[0].values()))
            row |= check(lambda o, got=got: lambda: got)
            chains[name].program = made(every[name])
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del chains[name]
        found[name] = row
    for name, timing in timed(chains, length, rounds).items():
        us = timing["us"]
        found[name] |= timing | {"TB/s": round(moved / us / 1e6, 4), "TFLOP/s": round(case.flops(tokens) / us / 1e6, 2)}
    yield from found.values()


def main() -> None:
    """Run, print, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusions", default="", help="cases whose names begin so, comma between them, in this order")
    parser.add_argument("--tokens", default="1,64,4096")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no measurement after so long")
    parser.add_argument("--json")
    args = parser.parse_args()
    child, begin, result = Child(measured), time.monotonic(), environment() | {"rows": [], "left out": []}
    fusions = [name for name, case in CASES.items() if case.fusion in FUSIONS]
    wanted = dict.fromkeys(n for f in args.fusions.split(",") for n in fusions if n.startswith(f))
    for case, t in ((CASES[n], t) for n in wanted for t in numbers(args.tokens)):
        if time.monotonic() - begin > args.seconds:
            result["left out"].append(f"{case.name} T={t}")
            continue
        head = {"case": case.name, "T": t, "dtype": args.dtype}
        rows = [head | row for row in child.rows(case.name, t, args.dtype, args.rounds)]
        result["rows"] += rows
        shown = " | ".join(f"{r['side']} {r.get('us', r.get('problem'))} {r.get('error', r.get('relative', ''))}" for r in rows)
        print(f"{case.name} T={t} [{time.monotonic() - begin:.0f} s] {shown}", flush=True)
        if args.json:
            write(args.json, result)
    child.close()
    if args.json:
        times(result, Path(args.json).with_suffix(".svg"))


if __name__ == "__main__":
    main()
