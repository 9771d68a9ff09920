"""What stands between two blocks of a tensor-parallel layer in PyTorch: a sum over ranks, residual add and norm, µs a link.

    python bench/all_reduce.py [--tokens 1,8,64] [--tp 2] [--json FILE]
    python bench/all_reduce.py --check --tokens 1,64 --calls 1000000

A process for each GPU, started here and kept for all cases; what the first rank is at is told as it goes on. A chain of links
in a CUDA graph, each on what the one before made: `packets` (one kernel, docs/collectives.md), `nccl` (NCCL's all-reduce in
place, then moekit's norm), `one-shot` (the same with the one-shot kernel of `torch.distributed._symmetric_memory`, whose
operand the norm writes where it is wanted) and, where `--kinds packets,two-shot,flashinfer` asks for them, the two-shot kernel
of symmetric memory and FlashInfer's fused one, which SGLang and vLLM take, too, and which it compiles for minutes where that
was not done before. Before a chain is timed, ranks read 256 MiB and
meet, so that none waits for another's start.
`us` is the first rank's. `bits` is the share of the residual's elements that are the float32 sum in the order of ranks, rounded
once; a peer that rounds the sum before it adds has fewer.

`--check` counts calls whose residual is not that sum on some rank: `late` with one rank, drawn anew for each call, that
comes up to 100 µs late, a hundredth as many.
"""

import argparse
import atexit
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed as dist

sys.path.insert(0, __file__.rpartition("/bench/")[0])

import moekit.torch as mt
from bench import runner
from bench.cases import DEVICE, EPS
from bench.child import Child
from bench.device_torch import captured, replayed
from moekit.testing import others
from moekit.torch import Channel

HIDDEN = 2048
SIDES = ("packets", "nccl", "one-shot")
LATE, LATEST = 100, 150_000  # one call in so many, and ticks of the GPU's clock
PATIENCE = 300  # seconds for a case
Link = Callable[[], Any]


class Rank(NamedTuple):
    """One rank's operands: parts [tp, T, H] of all ranks, residual [T, H] and weight [H]."""

    me: int
    parts: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor

    @property
    def mine(self) -> torch.Tensor:
        """A copy of this rank's part."""
        return self.parts[self.me].clone()


def drawn(me: int, tp: int, tokens: int, width: int, dtype: torch.dtype) -> Rank:
    """Random numbers, the same on all ranks."""
    made = torch.Generator().manual_seed(tokens)
    shapes = (tp, tokens, width), (tokens, width), (width,)
    return Rank(me, *(torch.randn(s, generator=made).to(DEVICE, dtype) for s in shapes))


def in_order(parts: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The float32 sum of parts [tp, T, H] in the order of ranks, then the residual, rounded to its dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return (total + residual.float()).to(residual.dtype)


def packets(rank: Rank, x: torch.Tensor, residual: torch.Tensor) -> Link:
    """moekit's kernel; `x` becomes what is normalised, `residual` the sum, of this side and of the others."""
    given = {"tp": len(rank.parts), "eps": EPS, "implementation": "triton"}
    return lambda: mt.all_reduce_add_rms_norm_(x, residual, rank.weight, out=x, **given)


def nccl(rank: Rank, x: torch.Tensor, residual: torch.Tensor) -> Link:
    """torch.distributed's all-reduce, then moekit's norm."""

    def link() -> None:
        dist.all_reduce(x)
        mt.add_rms_norm_(x, residual, rank.weight, out=x)

    return link


def shared(x: torch.Tensor) -> str:
    """Move a tensor into symmetric memory, once; the name of the group that reaches it."""
    from torch.distributed import _symmetric_memory as symmetric

    name = dist.group.WORLD.group_name
    memory = symmetric.empty(*x.shape, dtype=x.dtype, device=x.device)
    symmetric.rendezvous(memory, name)
    memory.copy_(x)
    x.set_(memory)
    return name


def one_shot(rank: Rank, x: torch.Tensor, residual: torch.Tensor) -> Link:
    """The kernel of symmetric memory, then moekit's norm; it has no copy to make, as x is moved there once."""
    name = shared(x)

    def link() -> None:
        total = torch.ops.symm_mem.one_shot_all_reduce(x, "sum", name)
        mt.add_rms_norm_(total, residual, rank.weight, out=x)

    return link


def two_shot(rank: Rank, x: torch.Tensor, residual: torch.Tensor) -> Link:
    """The kernel of symmetric memory in which each rank adds up a part of all rows, in place; then moekit's norm."""
    name = shared(x)

    def link() -> None:
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", name)
        mt.add_rms_norm_(x, residual, rank.weight, out=x)

    return link


def flashinfer(rank: Rank, x: torch.Tensor, residual: torch.Tensor) -> Link:
    """FlashInfer's all-reduce with residual and norm in one kernel, with dependent launch; its weight is 1 + ours."""
    comm, (t, h) = others.module("flashinfer.comm"), x.shape
    backend = others.module("flashinfer.comm.mnnvl").TorchDistBackend(group=dist.group.WORLD)
    space = comm.create_allreduce_fusion_workspace(
        backend="trtllm", world_size=len(rank.parts), rank=rank.me, max_token_num=t, hidden_dim=h, dtype=x.dtype,
        comm_backend=backend,
    )  # fmt: skip
    given = {"residual_in": residual, "residual_out": residual, "rms_gamma": 1 + rank.weight, "rms_eps": EPS}
    given |= {"pattern": comm.AllReduceFusionPattern.kARResidualRMSNorm, "launch_with_pdl": True, "fp32_acc": True}
    here, there = [x], [torch.empty_like(x)]

    def link() -> None:
        comm.allreduce_fusion(input=here[0], norm_out=there[0], workspace=space, **given)
        here[0], there[0] = there[0], here[0]

    return link


MAKERS = {"packets": packets, "nccl": nccl, "one-shot": one_shot, "two-shot": two_shot, "flashinfer": flashinfer}


def agreed(problem: str) -> str:
    """What is in the way on some rank: all must go the same way, or they would wait for each other for ever."""
    said = [""] * dist.get_world_size()
    dist.all_gather_object(said, problem)
    return next(filter(None, said), "")


def tell(me: int, what: str) -> None:
    """Say what the first rank is at: of a case that does not end one sees where."""
    if me == 0:
        print(f"  {time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def measure(rank: Rank, sides: tuple[str, ...], links: int, rounds: int) -> list[dict]:
    """One row per side."""
    wanted, meeting = in_order(rank.parts, rank.residual), torch.zeros(1, device=DEVICE)

    def prepare(side: str) -> tuple[dict, Any]:
        tell(rank.me, f"T {len(rank.residual)}: {side}")
        x, residual, made, problem = rank.mine, rank.residual.clone(), None, ""
        try:
            made = MAKERS[side](rank, x, residual)
            made()
        except Exception as error:
            problem = f"{error}"
        if why := agreed(problem):
            raise RuntimeError(why)
        assert made is not None
        bits = float((residual == wanted).float().mean())
        return {"bits": bits}, captured([made] * links)

    def timed(graphs: Mapping[str, Any]) -> dict[str, dict]:
        tell(rank.me, f"T {len(rank.residual)}: {', '.join(graphs)} in turn")
        return replayed(graphs, rounds, before=lambda: dist.all_reduce(meeting))

    return runner.beside(sides, prepare, timed)


def check(rank: Rank, channel: Channel | None, links: int, calls: int) -> list[dict]:
    """How many of so many calls were wrong, and of a hundredth with a late rank; without a GPU, of gathered sums."""
    draw, rows, given = np.random.default_rng(0), [], {"tp": len(rank.parts)}
    if channel:
        given["implementation"] = "triton"
    every = [rank.parts.roll(k, -1) for k in range(links)]  # two calls in a row must not have the same numbers
    wanted = torch.stack([in_order(parts, rank.residual) for parts in every])
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def chain(late: bool) -> None:
        found = []
        for parts in every:
            who, ticks = int(draw.integers(len(parts))), int(draw.integers(LATEST))
            if late and who == rank.me and channel:
                torch.cuda._sleep(ticks)
            found.append(mt.all_reduce_add_rms_norm(parts[rank.me], rank.residual, rank.weight, **given)[1])
        wrong.add_((torch.stack(found) != wanted).any(-1).any(-1).sum())

    for side, n in (("in a row", calls), ("late", calls // LATE)):
        one, times = partial(chain, side == "late"), -(-n // links)
        graph = captured([one]) if channel else None
        wrong.zero_()
        begin = time.perf_counter()
        for i in range(times):
            graph.graph.replay() if graph else one()
            if channel and (i % 100 == 99 or i == times - 1):
                channel.check()
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        rows.append({"side": side, "calls": times * links, "wrong": int(wrong), "s": round(time.perf_counter() - begin, 3)})
    return rows


def joined(me: int, tp: int, at: str) -> None:
    """Make this process one of a group, with a GPU of its own. `at`: the file in which ranks find each other."""
    where, backend = {}, "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(me)
        where, backend = {"device_id": torch.device("cuda", me)}, "nccl"
    dist.init_process_group(backend, init_method=f"file://{at}", rank=me, world_size=tp, **where)


def on_rank(me: int, tp: int, at: str, tokens: int, width: int, dtype: str, way: tuple, checked: bool) -> list[dict]:
    """The rows of one rank, whose process stays in its group: symmetric memory knows a group's name once in a process."""
    if not dist.is_initialized():
        tell(me, "joins the other ranks")
        joined(me, tp, at)
    tell(me, f"T {tokens}: opens a channel")
    channel = Channel(rows=tokens, width=width) if DEVICE == "cuda" and (checked or "packets" in way[0]) else None
    try:
        rank, (sides, links, rounds, calls) = drawn(me, tp, tokens, width, getattr(torch, dtype)), way
        return check(rank, channel, links, calls) if checked else measure(rank, sides, links, rounds)
    finally:
        if channel:
            channel.close()


class Ranks:
    """A process for each rank; all are new after one of them has failed."""

    def __init__(self, run: Callable[..., list[dict]], tp: int, patience: float):
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self.children = [Child(run, patience) for _ in range(tp)]
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def rows(self, *of: Any) -> list[dict]:
        """The first rank's rows of `run(rank, tp, file, *of)`, or what went wrong on one of them."""
        self.folder = self.folder or tempfile.TemporaryDirectory()
        tp, at = len(self.children), str(Path(self.folder.name) / "ranks")
        with ThreadPoolExecutor(tp) as pool:
            found = list(pool.map(lambda rank: self.children[rank].asked(rank, tp, at, *of), range(tp)))
        failed = next((rows for rows in found if "all" in (row["side"] for row in rows)), None)
        if failed:
            self.close()
        return failed or found[0]

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.close()
        if self.folder:
            self.folder.cleanup()
        self.folder = None


def on_ranks(run: Callable[..., list[dict]], tp: int, patience: float, *of: Any) -> list[dict]:
    """The first rank's rows of `run(rank, tp, file, *of)`, a process for each, or what went wrong on one of them."""
    ranks = Ranks(run, tp, patience)
    try:
        return ranks.rows(*of)
    finally:
        ranks.close()


@functools.cache
def kept(tp: int) -> Ranks:
    """The ranks of all cases."""
    ranks = Ranks(on_rank, tp, PATIENCE)
    atexit.register(ranks.close)
    return ranks


def answer(tp: int, *of: Any) -> list[dict]:
    """The rows of a case. Without a GPU a single rank needs no process of its own."""
    if tp > 1 or DEVICE == "cuda":
        return kept(tp).rows(*of)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return on_rank(0, 1, str(Path(folder) / "ranks"), *of)
        finally:
            dist.destroy_process_group()


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per number of tokens, each with processes of its own."""
    tp = args.tp or torch.cuda.device_count()
    for t in args.tokens:
        head = {"case": f"all_reduce_add_rms_norm {args.width}", "tp": tp, "T": t, "dtype": args.dtype}
        way = args.kinds, args.links, args.rounds, args.calls
        yield head, (tp, t, args.width, args.dtype, way, args.check)


QUESTION = runner.Question(
    __doc__,
    cases,
    answer,
    smoke="--tokens 3 --tp 1 --width 32 --kinds nccl --links 2 --rounds 1 --dtype float32",
    options=(
        runner.Option("tokens", (1, 8, 64, 128)),
        runner.Option("tp", 0, "GPUs; 0: all that there are"),
        runner.Option("width", HIDDEN, "of a row"),
        runner.Option("kinds", SIDES, "of sums"),
        runner.Option("links", 96, "in a graph, as a step of 48 layers has"),
        runner.Option("check", False, "count wrong sums in place of microseconds"),
        runner.Option("calls", 1_000_000, "with --check"),
        runner.DTYPE,
        runner.ROUNDS,
    ),
    columns=("us", "bits", "calls", "wrong"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
