"""How long each fusion takes in JAX: moekit's kernels and XLA's, by the device's clock over a chain of calls in one jit.

    python bench/fusions_jax.py [--fusions NAME,…] [--tokens 1,64,4096] [--kinds pallas,triton,mosaic,xla] [--json FILE]

Kinds are moekit's implementations; fusions without kernels for `mosaic` have no row of it.

Each call of a chain has operands of its own and waits for the one before; the L2 is filled with something else before a chain
runs (bench/device_jax.py). Operands are contiguous; those that a fusion updates are donated. Beside each time stands how right
its outputs were, as in bench/fusions.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import cases as drawn
from bench import layer_jax, plots, runner
from bench.cases import CASES, Case
from bench.correctness import Checker
from bench.device_jax import compiled, made, timed
from bench.fusions import SIZES, named
from moekit import jax as mj
from moekit.backends.mosaic import unprinted
from moekit.fusions import FUSIONS

OURS = "moekit (jax)"  # by the first door that there is
KINDS = (OURS, "xla")
LENGTH = 24
LARGEST_BYTES = 4e9
UPDATED = {"add_rms_norm": ("residual", 1), "shared_expert_combine": ("hidden", 0), "delta_rule_step": ("state", 1),
           "conv_projections": ("state", 2), "scaled_conv_projections": ("state", 3),
           "down_combine": ("hidden", 0), "scaled_down_combine": ("hidden", 0), "gate_block": ("residual", 1),
           "moe_block": ("residual", 1), "all_reduce_add_rms_norm": ("residual", 1)}  # fmt: skip
Arrays = dict[str, Any]
Side = Callable[[Arrays], tuple]


def to_jax(x: torch.Tensor) -> jax.Array:
    """A tensor's numbers as a contiguous JAX array."""
    name = str(x.dtype).removeprefix("torch.")
    whole = x.float() if x.dtype.is_floating_point else x
    return jnp.asarray(whole.cpu().numpy()).astype(name)


def sides(case: Case, kinds: Sequence[str] = KINDS) -> dict[str, Side]:
    """Every side of a case as a function of its operands that returns a tuple: moekit's kernels, then XLA's."""
    if case.part:
        return {name: partial(one, k=case.params["k"], part=case.part) for name, one in layer_jax.layers().items()}
    return {kind: partial(_fusion, case, None if kind == OURS else kind) for kind in kinds}


def _fusion(case: Case, implementation: str | None, given: Arrays) -> tuple:
    operands = (given[n] for n in FUSIONS[case.fusion].tensors)
    got = getattr(mj, case.fusion)(*operands, **case.params, implementation=implementation)
    return got if isinstance(got, tuple) else (got,)


class Chain:
    """A program of one call of a fusion per set of operands, each waiting for the one before.

    What the fusion updates is donated, and the next run begins with what it became, as in a decode step; it is what the program
    returns first, since JAX gives a donated buffer to the first output that it fits.
    """

    def __init__(self, case: Case, one: Side, sets: Sequence[Arrays]):
        self.one, (self.updated, self.place) = one, UPDATED.get(case.fusion, ("", 0))
        self.fixed = [{n: x for n, x in s.items() if n != self.updated} for s in sets]
        self.state = [{self.updated: jnp.copy(s[self.updated])} if self.updated else {} for s in sets]
        self.program = jax.jit(self._run, donate_argnums=1)

    def _run(self, fixed: Sequence[Arrays], state: Sequence[Arrays]) -> tuple[list, list]:
        before, kept, after = (), [], []
        for given, old in zip(fixed, state, strict=True):
            (given, old), before = lax.optimization_barrier(((given, old), before))
            before = self.one(given | old)
            after.append({self.updated: before[self.place]} if old else {})
            kept.append(tuple(x for i, x in enumerate(before) if not old or i != self.place))
        return after, kept

    def lower(self) -> jax.stages.Lowered:
        """The program for these operands, to be compiled."""
        return self.program.lower(self.fixed, self.state)

    def __call__(self):
        """Run the program: the new values of what is updated, and the other outputs of every call."""
        self.state, kept = self.program(self.fixed, self.state)
        return self.state, kept


def printed(case: Case, operands: Arrays, kinds: Sequence[str]) -> list[str]:
    """The kinds that serve a case."""
    fusion = FUSIONS[case.fusion]
    arrays = {n: operands[n] for n in fusion.tensors}
    dtypes = {n: x.dtype.name for n, x in arrays.items()}
    binding = fusion.bind({n: x.shape for n, x in arrays.items()}, dtypes, fusion.bind_params(case.params))
    graph = fusion.trace(binding)
    return [kind for kind in kinds if kind != "mosaic" or unprinted(graph, dict(binding.sizes)) is None]


def measure(name: str, tokens: int, dtype: str, rounds: int, kinds: Sequence[str] = KINDS) -> list[dict]:
    """One row per side. Each call of a chain has the first one's numbers, moved on by one element."""
    case, kind = CASES[name], getattr(torch, dtype)
    drawn.DEVICE = "cpu"  # this is a process of JAX's
    length = max(2, min(LENGTH, int(LARGEST_BYTES // case.moved(tokens, kind.itemsize))))
    check, sets = Checker(case, case.make(tokens, kind)), []
    roll, given = jax.jit(jnp.roll), {n: to_jax(x) for n, x in check.operands.items()}
    for i in range(length):
        moved = {n: roll(x, i) for n, x in given.items()}
        sets.append(layer_jax.packed(moved) if case.part else moved)
    served = kinds if case.part else printed(case, given, kinds)
    chains = {side: Chain(case, one, sets) for side, one in sides(case, served).items()}
    single = compiled({side: partial(jax.jit(chain.one).lower, sets[0]) for side, chain in chains.items()}, at_once=1)
    every = compiled({side: chain.lower for side, chain in chains.items()})

    def prepare(side: str) -> tuple[dict, Chain]:
        chains[side].program = made(every[side])
        return check(lambda operands: [*map(np.asarray, made(single[side])(sets[0]))]), chains[side]

    rows = runner.beside(chains, prepare, lambda ready: timed(ready, length, rounds))
    return [row | case.rates(tokens, kind.itemsize, row.get("us")) for row in rows]


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Every case and number of tokens that was asked for."""
    for name in named(args.fusions):
        for t in () if CASES[name].part else args.tokens:  # bench/moe_block.py asks for blocks
            yield {"case": name, "T": t, "dtype": args.dtype}, (name, t, args.dtype, args.rounds, args.kinds)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--fusions silu_and_mul 64 --tokens 2",
    options=(
        SIZES[0],
        runner.Option("tokens", (1, 64, 4096)),
        *SIZES[2:],
        runner.Option("kinds", KINDS, "of kernels; pallas, triton and mosaic by name"),
    ),
    patience=180,
    plot=plots.times,
    columns=("us", "error", "relative", "ids"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
