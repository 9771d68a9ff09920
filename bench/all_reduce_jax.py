"""What stands between two blocks of a tensor-parallel layer in JAX: a sum over ranks, residual add and norm, µs a link.

    python bench/all_reduce_jax.py [--tokens 1,8,64] [--tp 2] [--json FILE]
    python bench/all_reduce_jax.py --check --tokens 1,64 --calls 1000000

A chain of links in one jit, each on what the one before made: `packets` (one kernel, docs/collectives.md), `gather` (every
rank's part gathered, added up and normalised by XLA) and `psum` (XLA's all-reduce, then moekit's norm). `us` is of a link in a
stream of chains, by the host's clock; `kernels us` what the first device's kernels take in a link, their waiting for the other
ranks included, by its own clock; `typical us` the same if each took the median, whatever a chain's first one waits for devices
that were given theirs later. `bits` is the share of the residual's elements that are the float32 sum in the order of ranks
rounded once, as NumPy has it.

`--check` counts calls whose residual is not that sum on some rank, each against numbers that no rank sent it, in a program that
goes through some calls again and again: `late` with one
rank, drawn anew for each call, that comes some tens of microseconds late, a hundredth as many.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.device_jax import profiled, typical
from bench.model_jax import mesh_of, stream
from moekit.cli.platform import gpu_count
from moekit.jax import Channel, Link, add_rms_norm, all_reduce_add_rms_norm, exchange

HIDDEN = 2048
SIDES = ("packets", "gather", "psum")
PROFILED = 5  # chains
CHAINED, TURNS = 8, 1000  # calls that are compiled of a check, and how often a program goes through them
LATE, LATEST = 100, 8  # one call in so many, and turns of a loop, of which each waits for the host
Linked = tuple[tuple[jax.Array, jax.Array], Link | None]


@functools.cache
def channel_of(tp: int, width: int, tokens: int) -> Channel:
    """The process's channel; raises UnavailableError where there can be none."""
    return Channel(mesh_of(tp), width=width, rows=tokens)


def joined(side: str, tp: int, x: jax.Array, residual: jax.Array, weight: jax.Array, link: Link | None) -> Linked:
    """One link on one rank: what is normalised of the sum, the residual, and the link of the next call."""
    if side == "psum":
        return add_rms_norm(lax.psum(x, "tp"), residual, weight), link
    if link is None:
        return all_reduce_add_rms_norm(x, residual, weight, tp=tp, implementation="xla"), None
    return exchange(all_reduce_add_rms_norm, link, x, residual, weight, tp=tp, implementation="pallas")


def chain(side: str, tp: int, links: int, x: jax.Array, residual: jax.Array, weight: jax.Array, link: Link | None) -> tuple:
    """So many links. Weights differ from rank to rank, so that no compiler can know that ranks have the same part."""
    x, weight = x[0], weight[0]
    for _ in range(links):
        (x, residual), link = joined(side, tp, x, residual, weight, link)
    return x[None], residual[None], link


class Ranked:
    """A function of one rank's arrays and link as a program on a mesh; each call goes on with the link of the one before."""

    def __init__(self, run: Callable[..., tuple], mesh: Mesh, ins: tuple, outs: tuple, channel: Channel | None):
        self.channel = channel
        way = channel.link.specs if channel else P()
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(*ins, way), out_specs=(*outs, way), check_vma=False)
        self.program = jax.jit(mapped)

    def __call__(self, *given: jax.Array) -> tuple[Any, ...]:
        """Dispatch one call."""
        if self.channel is None:
            return self.program(*given, None)[:-1]
        with self.channel.lock:
            *found, link = self.program(*given, self.channel.link)
            self.channel.keep(link)
        return tuple(found)


def opened(side: str, *of: int) -> Channel | None:
    """What a side goes by."""
    return channel_of(*of) if side == "packets" else None


def drawn(seed: int, dtype: str, *shape: int) -> jax.Array:
    """Random normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def in_order(parts: Any, residual: Any) -> Any:
    """The float32 sum of parts [tp, T, H] in the order of ranks, then the residual, rounded to its dtype; NumPy's or JAX's."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return (total + residual.astype(np.float32)).astype(residual.dtype)


def measure(tp: int, tokens: int, width: int, dtype: str, sides: tuple[str, ...], links: int, calls: int) -> list[dict]:
    """One row per side."""
    mesh, ins = mesh_of(tp), (P("tp"), P(), P("tp"))
    given = drawn(0, dtype, tp, tokens, width), drawn(1, dtype, tokens, width), drawn(2, dtype, tp, width)
    wanted = in_order(*map(np.asarray, given[:2]))

    def prepare(side: str) -> tuple[dict, Callable[[], tuple]]:
        channel = opened(side, tp, width, tokens)
        one, many = (Ranked(partial(chain, side, tp, n), mesh, ins, (P("tp"), P("tp")), channel) for n in (1, links))
        got = np.asarray(one(*given)[1])
        jax.block_until_ready(many(*given))
        if channel:
            channel.check()
        return {"bits": float(np.mean(got == wanted))}, lambda: many(*given)

    def timed(ready: Mapping[str, Any]) -> dict[str, dict]:
        found = {}
        for side, call in ready.items():
            ms, dispatch = stream(call, calls)
            seen = profiled(lambda call=call: [jax.block_until_ready(call()) for _ in range(PROFILED)], device=0)
            kernels = sum(event.end - event.begin for event in seen) / PROFILED
            found[side] = {"us": round(ms * 1e3 / links, 3), "dispatch us": round(dispatch * 1e3 / links, 3)}
            found[side]["kernels us"] = round(kernels / links, 3)
            found[side]["typical us"] = round(typical(seen) / PROFILED / links, 3)
            if side == "packets":
                channel_of(tp, width, tokens).check()
        return found

    return runner.beside(sides, prepare, timed)


def repeated(
    late: bool, tp: int, links: int, turns: int, parts: jax.Array, residual: jax.Array, seed: jax.Array, link: Any
) -> tuple:
    """So many turns of so many calls in a row on one rank, each of other parts [tp, T, H] than the one before: in how many of
    all these calls the residual is not the sum in order."""
    every = lax.optimization_barrier([jnp.roll(parts, k, axis=-1) for k in range(links)])

    def turn(i: jax.Array, done: tuple) -> tuple:
        wrong, link = done
        more, link = chained(late, tp, every, residual, seed * turns + i.astype(jnp.uint32), link)
        return wrong + more, link

    wrong, link = lax.fori_loop(0, turns, turn, (jnp.int32(0), link))
    return wrong[None], link


def chained(late: bool, tp: int, every: list[jax.Array], residual: jax.Array, seed: jax.Array, link: Any) -> tuple:
    """A call of each of some parts [tp, T, H], one after the other: how many were wrong, and the link after them."""
    me, found = lax.axis_index("tp"), []
    for k, mine in enumerate(every):
        x = mine[me]
        if late:
            key = jax.random.fold_in(jax.random.key(seed), k)
            who, turns = jax.random.randint(key, (2,), 0, jnp.array([tp, LATEST]))
            x = lax.fori_loop(0, jnp.where(me == who, turns, 0), lambda _, x: lax.optimization_barrier(x), x)
            x, link = lax.optimization_barrier((x, link))
        weight = jnp.zeros(x.shape[-1], x.dtype)
        (_, total), link = joined("packets", tp, x, residual, weight, link)
        found.append(total)
    found, every = lax.optimization_barrier((found, every))
    wrong = [jnp.any(total != in_order(each, residual)) for total, each in zip(found, every, strict=True)]
    return jnp.sum(jnp.stack(wrong), dtype=jnp.int32), link


def check(tp: int, tokens: int, width: int, dtype: str, links: int, calls: int) -> list[dict]:
    """How many of so many calls were wrong, and of a hundredth with a late rank; without a channel, of gathered sums."""
    mesh, parts, residual = mesh_of(tp), drawn(0, dtype, tp, tokens, width), drawn(1, dtype, tokens, width)
    channel = channel_of(tp, width, tokens) if jax.default_backend() == "gpu" else None
    rows, links = [], min(links, CHAINED)
    for side, n in (("in a row", calls), ("late", calls // LATE)):
        turns = min(TURNS, -(-n // links) or 1)
        times, chain = -(-n // (links * turns)), partial(repeated, side == "late", tp, links, turns)
        run = Ranked(chain, mesh, (P(), P(), P()), (P("tp"),), channel)
        wrong, begin = np.zeros(tp, int), time.perf_counter()
        for i in range(times):  # each waited for: one that waits in vain must not be followed by others
            (found,) = run(parts, residual, jnp.uint32(i))
            wrong += np.asarray(found)
            if channel:
                channel.check()
        rows.append({"side": side, "calls": times * links * turns, "wrong": int(wrong.max())})
        rows[-1]["s"] = round(time.perf_counter() - begin, 3)
    return rows


def answer(checked: bool, *of: Any) -> list[dict]:
    """The rows of a case, measured or checked."""
    *head, sides, links, calls, many = of
    return check(*head, links, many) if checked else measure(*head, sides, links, calls)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per number of tokens."""
    tp = args.tp or gpu_count()  # JAX would take the GPUs' memory for this process, which measures nothing
    for t in args.tokens:
        head = {"case": f"all_reduce_add_rms_norm {args.width}", "tp": tp, "T": t, "dtype": args.dtype}
        yield head, (args.check, tp, t, args.width, args.dtype, args.kinds, args.links, args.chains, args.calls)


QUESTION = runner.Question(
    __doc__,
    cases,
    answer,
    smoke="--tokens 3 --tp 2 --width 32 --kinds gather,psum --links 1 --chains 1 --dtype float32",
    options=(
        runner.Option("tokens", (1, 8, 64, 128)),
        runner.Option("tp", 0, "GPUs; 0: all that there are"),
        runner.Option("width", HIDDEN, "of a row"),
        runner.Option("kinds", SIDES, "of sums"),
        runner.Option("links", 96, "in a chain, as a step of 48 layers has"),
        runner.Option("chains", 20, "in a stream"),
        runner.Option("check", False, "count wrong sums in place of microseconds"),
        runner.Option("calls", 1_000_000, "with --check"),
        runner.DTYPE,
    ),
    patience=600,
    columns=("us", "kernels us", "typical us", "bits", "calls", "wrong"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
