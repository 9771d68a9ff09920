"""How long a fusion's Pallas kernels take by schedule, side by side: what the rules choose, and others that are worth a try.

    python bench/schedules_jax.py [--fusions NAME,…] [--tokens 1,8] [--schedules 'TEXT; TEXT'] [--json FILE]

Operands have the 80B's sizes on one GPU, float8 where the declaration has that first. A chain's calls have rows and ids of
their own, and weights too, but for stacks of experts, of which every call picks others (bench/device_jax.py). `relative` is
the distance from what the rules' schedule gives. CANDIDATES are what a sweep tries; --schedules adds others.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.device_jax import compiled, made, timed
from bench.fusions_jax import Arrays, Chain
from moekit import jax as mj
from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example

LENGTH, RULES = 12, "rules"
EIGHTY = {"D": 2048, "H": 2048, "I": 512, "J": 512, "E": 512, "K": 10, "G": 1, "C": 8192, "P": 4096, "Q": 64, "S": 3, "H?": 1}
SMALL = {"D": 64, "H": 64, "I": 32, "J": 32, "E": 8, "K": 2, "G": 1, "C": 64, "P": 32, "Q": 8, "S": 3, "H?": 1}
OWN = {"scaled_product": {"D": 4096, "P": 2048}}  # a mixer's projection back
LANES = " by lanes"  # behind the name of a fusion that has them as a parameter
CODES = 64.0
_ROWS = "tile:T:1 tile:K:1 tile:I:{} whole:Db:16 whole:Di:128 warps:{} stages:1 dependent"
_PAIRS = "tile:T:1 loop:K:{} tile:H:{} whole:Ib:4 whole:Ii:128 warps:{} stages:1 dependent"
_BOTH = "tile:T:1 loop:K:{} tile:H:{} whole:Ib:4 whole:Ii:128 whole:Jb:4 whole:Ji:128 warps:{} stages:1 dependent"
_APART = (
    "tile:K.part:1 tile:T:1 loop:K:1 tile:H:{} whole:Ib:4 whole:Ii:128 warps:{} stages:1 dependent split:K:10 then "
    "loop:K.part:1 tile:T:{} tile:H:{} {}:Jb:{} whole:Ji:128 warps:4 stages:{} dependent"
)
_ALONE = "tile:T:1 tile:P:{} whole:Db:32 whole:I:128 warps:{} stages:1 dependent"
_PARTS = (
    "tile:Db.part:1 tile:T:16 tile:P:{} loop:Db:1 whole:I:128 warps:4 stages:{} dependent split:Db:{} then "
    "loop:Db.part:1 tile:T:1 tile:P:256 warps:4 stages:1 dependent"
)
_CONV = (
    "rest(tile:T:1 tile:P:{0} whole:Db:16 whole:I:128) gated(tile:T:1 tile:Q:{0} whole:Db:16 whole:I:128) "
    "out,state(tile:T:1 tile:C:{0} whole:S:4 whole:S+1:4 whole:Db:16 whole:I:128) warps:{1} stages:1 dependent"
)
_FEW = (
    "rest(tile:T:16 tile:P:{0} loop:Db:1 whole:I:128) gated(tile:T:16 tile:Q:{1} loop:Db:1 whole:I:128) "
    "out,state(tile:T:16 tile:C:{0} whole:S:4 whole:S+1:4 loop:Db:1 whole:I:128) warps:{2} stages:{3} dependent"
)
CANDIDATES = {
    "scaled_expert_gate_up": [_ROWS.format(*n) for n in ((1, 1), (4, 2), (4, 4), (8, 2), (16, 4), (16, 8))],
    "scaled_expert_down": [_PAIRS.format(*n) for n in ((1, 8, 4), (2, 4, 2), (2, 16, 4), (4, 8, 8))],
    "scaled_expert_down_shared": [
        *(_BOTH.format(*n) for n in ((1, 8, 4), (2, 8, 4), (2, 16, 4), (4, 8, 8))),
        *(_APART.format(*n, "loop", 1, 4) for n in ((8, 1, 16, 64), (16, 4, 16, 16))),
        _APART.format(16, 4, 1, 8, "whole", 4, 1),
    ],
    f"scaled_product{LANES}": [_ALONE.format(*n) for n in ((1, 2), (1, 4), (4, 4), (4, 8), (2, 8))],
    f"scaled_conv_projections{LANES}": [_CONV.format(*n) for n in ((2, 2), (1, 1), (8, 4), (8, 8))],
    "scaled_conv_projections": [_FEW.format(*n) for n in ((32, 16, 4, 8), (32, 16, 2, 8), (64, 32, 4, 6), (16, 16, 2, 8))],
    "scaled_experts": [],  # on the matrix unit, with one pair a program: beside the two of few tokens
    "scaled_product": [_PARTS.format(*n) for n in ((64, 8, 4), (32, 4, 8), (64, 2, 16))],
    "scaled_gate_topk": [],
    "gate_topk": [],
}


def operands(fusion: str, sizes: Mapping[str, int], tokens: int, params: Mapping[str, object]) -> Iterator[Arrays]:
    """Sets of operands without an end; stacks of experts are the same in all."""
    declared, key = FUSIONS[fusion], jax.random.key(0)
    axes = {a for s in declared.tensors.values() for d in s.dims for _, a in d.terms}
    known = {a: n for a, n in sizes.items() if a.removesuffix("?") in axes} | {"T": tokens}
    dtypes = {
        n: s.dtypes[0] if len(s.dtypes) < 3 or "float8_e4m3fn" in s.dtypes else "bfloat16" for n, s in declared.tensors.items()
    }
    bound = example(declared, known, dtypes, params)
    shapes = {n: tuple(1 if d.optional else d.size(dict(bound.sizes)) for d in s.dims) for n, s in declared.tensors.items()}
    held: Arrays = {}
    while True:
        given = {}
        for name, shape in shapes.items():
            key, own = jax.random.split(key)
            stacked = declared.tensors[name].dims[0].text == "E" and len(shape) == 3
            given[name] = held[name] if name in held else drawn(own, name, shape, dict(bound.dtypes)[name], known)
            held |= {name: given[name]} if stacked else {}
        yield given


def drawn(key: jax.Array, name: str, shape: tuple[int, ...], dtype: str, sizes: Mapping[str, int]) -> jax.Array:
    """Random numbers: distinct ids in each row, codes all over their range, scales that make them small again."""
    if name == "ids":
        rows = jax.vmap(lambda k: jax.random.permutation(k, sizes["E"])[: shape[1]])(jax.random.split(key, shape[0]))
        return rows.astype(jnp.int32)
    if "scale" in name:
        return jnp.full(shape, 2048**-0.5 / CODES, jnp.float32)
    size = CODES if dtype == "float8_e4m3fn" else 1.0 if shape[0] == sizes["T"] else shape[-1] ** -0.5
    make = jax.jit(lambda k: (jax.random.normal(k, shape, jnp.bfloat16) * size).astype(dtype))
    return make(key)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Fusions by tokens."""
    for fusion in args.fusions:
        more = tuple(text.strip() for text in args.schedules.split(";") if text.strip())
        for t in args.tokens:
            yield {"case": fusion, "T": t, "dtype": "float8_e4m3fn"}, (fusion, t, more, args.rounds, args.smoke)


def measure(case: str, tokens: int, more: tuple[str, ...], rounds: int, small: bool) -> list[dict]:
    """One row per schedule."""
    fusion = case.removesuffix(LANES)
    sizes = SMALL if small else EIGHTY | OWN.get(fusion, {})
    params: dict[str, Any] = {"k": min(10, sizes["E"])} if "k" in FUSIONS[fusion].params else {}
    params |= {"lanes": True} if case != fusion else {}
    make = operands(fusion, sizes, tokens, params)
    sets = [next(make) for _ in range(2 if small else LENGTH)]
    names = [RULES, *(CANDIDATES[case] if not small else []), *more]

    def one(name: str, given: Arrays) -> tuple:
        chosen = {} if name == RULES else {"schedule": Schedule.parse(name)}
        implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
        out = getattr(mj, fusion)(
            *(given[n] for n in FUSIONS[fusion].tensors), **params, implementation=implementation, **chosen
        )
        return out if isinstance(out, tuple) else (out,)

    chains = {name: Chain(SimpleNamespace(fusion=fusion), partial(one, name), sets) for name in names}
    every = compiled({name: chain.lower for name, chain in chains.items()})
    wanted = [np.asarray(x, np.float64) for x in jax.jit(partial(one, RULES))(sets[0])]

    def prepare(name: str) -> tuple[dict, Chain]:
        chains[name].program = made(every[name])
        got = [np.asarray(x, np.float64) for x in jax.jit(partial(one, name))(sets[0])]
        off = max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(got, wanted, strict=True))
        return {"relative": round(float(off), 6)}, chains[name]

    return runner.beside(chains, prepare, lambda ready: timed(ready, len(sets), rounds))


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke=f"--fusions scaled_product{LANES} --tokens 1 --rounds 1",
    options=(
        runner.Option("fusions", tuple(CANDIDATES), "those that a float8 step calls"),
        runner.Option("tokens", (1, 8)),
        runner.Option("schedules", "", "others, with semicolons between them"),
        runner.ROUNDS,
    ),
    columns=("us", "relative"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
