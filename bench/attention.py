"""How long attention of one new token takes over a cache: `attention_decode` and torch's scaled_dot_product_attention.

    python bench/attention.py [--lengths 1000,32768] [--batch 1,8,64] [--heads 2,1] [--json FILE]

Qwen3-Next's heads: 8 query heads to each of its `--heads` keys and values of 256 numbers (2 on one GPU, 1 on each of two). A
call has a cache of its own, so that none is in the L2. torch is given the cache cut to its length, as it has no lengths of its
own, and FlashInfer a copy in pages of its own, planned ahead. `--room N`: the cache has room for so many tokens, whatever it
holds. `relative`: the error against float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, __file__.rpartition("/bench/")[0])

import moekit.torch as mt
from bench import attention_peers, runner
from bench.cases import DEVICE, rows
from bench.device_torch import captured, replayed

GROUP, HEAD_DIM = 8, 256  # query heads to a key, numbers of a head
IN_CACHE = 200e6  # bytes of keys and values that no L2 holds
MOST = 24e9  # bytes of all caches
COPY = 4.29  # TB/s; see bench/ceilings.py


class Call(NamedTuple):
    """q [T, heads, group, D], keys and values [T, heads, L, D], lengths [T]."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor


def drawn(batch: int, heads: int, length: int, room: int, dtype: torch.dtype) -> Call:
    """Queries and a cache that holds `length` tokens and has room for `room`."""
    cache = [torch.zeros(batch, heads, room, HEAD_DIM, device=DEVICE, dtype=dtype) for _ in range(2)]
    for x in cache:
        x[:, :, :length] = rows(batch, heads, length, HEAD_DIM, dtype=dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    return Call(rows(batch, heads, GROUP, HEAD_DIM, dtype=dtype), *cache, lengths)


def ours(c: Call, length: int) -> Callable[[], torch.Tensor]:
    """The fusion."""
    return lambda: mt.attention_decode(c.q, c.keys, c.values, c.lengths, scale=HEAD_DIM**-0.5)


def sdpa(c: Call, length: int) -> Callable[[], torch.Tensor]:
    """torch's, of the first `length` tokens."""
    q, keys, values = c.q.flatten(1, 2).unsqueeze(2), *(x[:, :, :length] for x in (c.keys, c.values))
    return lambda: scaled_dot_product_attention(q, keys, values, enable_gqa=True).view(c.q.shape)


SIDES = {"moekit": ours, "torch sdpa": sdpa, **attention_peers.SIDES}


def relative(c: Call, length: int, out: torch.Tensor) -> float:
    """‖out − float64‖ / ‖float64‖ of the first row."""
    keys, values = (x[0, :, :length].double() for x in (c.keys, c.values))
    scores = torch.einsum("hgd,hld->hgl", c.q[0].double(), keys) * HEAD_DIM**-0.5
    want = torch.einsum("hgl,hld->hgd", scores.softmax(-1), values)
    return float((out[0].double() - want).norm() / want.norm())


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Batch by length by heads."""
    for heads in args.heads:
        for length in args.lengths:
            room = args.room or length
            for batch in args.batch:
                if 2 * batch * heads * room * HEAD_DIM * 2 <= MOST:
                    head = {"case": f"attention {heads} x 256", "T": batch, "length": length, "room": room, "dtype": args.dtype}
                    yield head, (batch, heads, length, room, args.dtype, args.rounds)


@torch.no_grad()
def measure(batch: int, heads: int, length: int, room: int, dtype: str, rounds: int) -> list[dict]:
    """One row per side."""
    kind = getattr(torch, dtype)
    read = 2 * batch * heads * length * HEAD_DIM * kind.itemsize
    count = int(min(max(2, IN_CACHE // read), 100, MOST // (read * room // length)))
    calls = [drawn(batch, heads, length, room, kind) for _ in range(max(1, count))]

    def prepare(side: str) -> tuple[dict, object]:
        made = [SIDES[side](c, length) for c in calls]
        return {"relative": round(relative(calls[0], length, made[0]()), 6)}, captured(made)

    found = runner.beside(SIDES, prepare, lambda graphs: replayed(graphs, rounds))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [{**r, **({"TB/s": round(read / r["us"] / 1e6, 3)} if "us" in r else {})} for r in found]


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--lengths 20 --batch 2 --heads 2 --room 40 --dtype float32 --rounds 1",
    options=(
        runner.Option("lengths", (1000, 32768), "tokens in the cache"),
        runner.Option("batch", (1, 8, 64)),
        runner.Option("heads", (2, 1), "of keys and values"),
        runner.Option("room", 0, "tokens that the cache has room for; 0: as many as it holds"),
        runner.DTYPE,
        runner.ROUNDS,
    ),
    columns=("us", "TB/s", "relative"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
