"""How long the routed experts of a layer take: `experts` in blocks of pairs, two gathered products, torch's grouped ones.

    python bench/experts.py [--tokens 1,16,64,4096] [--widths 512,256] [--blocks 1,16,64,128] [--float8] [--json FILE]

Experts are drawn evenly, other ones for each call; weights are the 80B's (512 experts, 10 a token, hidden size 2048), so that a
call's are not in the L2. Every side gets ids and weights as a router gives them: sorting is part of its time. `of floor` is the
time that the bytes of the distinct experts take at a copy's rate, over the side's; `relative` the error against float64 on the
first and last row. With --float8 there are sides whose weights are float8 with a scale for each 128 × 128 of them, of which the
floor has the bytes; down projections are then [H, I] of each expert, as in such checkpoints. Those of `rounded x` are
`quantised_experts`: as the peers do, they round x and what is activated to float8, too.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

sys.path.insert(0, __file__.rpartition("/bench/")[0])

import moekit.torch as mt
from bench import experts_peers, runner
from bench.cases import DEVICE, rows, weight
from bench.device_torch import captured, replayed

EXPERTS, TOP_K, HIDDEN = 512, 10, 2048
CALLS = {True: 12, False: 2}  # in a graph, each with other rows and experts: of few tokens, and of many
FEW, GATHERED = 64, 64  # tokens; those products read a pair's experts anew, which for more is not worth its time
COPY = 4.29  # TB/s; see bench/ceilings.py
BLOCK, CODES = 128, 64.0  # elements that share a scale; about as large are codes
FLOAT8 = "float8, "  # how the names of sides begin that have such weights


class Layer(NamedTuple):
    """gate_up [E, 2I, H] and down [E, I, H]."""

    gate_up: torch.Tensor
    down: torch.Tensor


class Scaled(NamedTuple):
    """gate_up [E, 2I, H] and down [E, H, I] in float8, and their scales."""

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor

    @classmethod
    def drawn(cls, experts: int, width: int, hidden: int) -> "Scaled":
        """Random codes and scales."""

        def matrices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            made = [weight(rows, columns, torch.bfloat16) * CODES for _ in range(experts)]
            grid = (experts, -(-rows // BLOCK), -(-columns // BLOCK))
            return torch.stack([m.to(torch.float8_e4m3fn) for m in made]), torch.rand(grid, device=DEVICE) / CODES

        (gate_up, _), (down, down_scale) = matrices(2 * width, hidden), matrices(hidden, width)
        halves = torch.rand((experts, 2 * -(-width // BLOCK), -(-hidden // BLOCK)), device=DEVICE) / CODES
        return cls(gate_up, halves, down, down_scale)

    @property
    def wide(self) -> Layer:
        """Codes times scales, in float64, of a few experts."""

        def times(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            spread = scales.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
            return codes.double() * spread[:, : codes.shape[1], : codes.shape[2]]

        pairs = zip(self.gate_up.view(torch.uint8).chunk(2, 1), self.gate_up_scale.chunk(2, 1), strict=True)
        gate_up = torch.cat([times(half.view(torch.float8_e4m3fn), scales) for half, scales in pairs], 1)
        return Layer(gate_up, times(self.down, self.down_scale).transpose(1, 2))

    def of(self, experts: torch.Tensor) -> "Scaled":
        """Some of the experts."""
        codes = [a.view(torch.uint8)[experts].view(torch.float8_e4m3fn) for a in (self.gate_up, self.down)]
        return Scaled(codes[0], self.gate_up_scale[experts], codes[1], self.down_scale[experts])


class Routed(NamedTuple):
    """One call's rows x [T, H], ids [T, K] and weights [T, K]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


Side = Callable[[Routed], torch.Tensor]


def drawn(tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> Routed:
    """Rows, and for each `top_k` experts with weights that add up to 1."""
    ids = torch.rand(tokens, experts, device=DEVICE).argsort(-1)[:, :top_k].int()
    return Routed(rows(tokens, hidden, dtype=dtype), ids, rows(tokens, top_k, dtype=torch.float32).softmax(-1))


def grouped(first: Sequence[torch.Tensor], down: torch.Tensor, call: Routed) -> torch.Tensor:
    """torch's grouped products over the pairs sorted by expert, and their weighted sum; `first` is gate_up, or gate and up."""
    (x, ids, weights), flat = call, call.ids.flatten()
    _, order = torch.sort(flat, stable=True)
    counts = torch.zeros(len(down), dtype=torch.int32, device=x.device).index_add_(0, flat, torch.ones_like(flat))
    ends, tokens = counts.cumsum(0, dtype=torch.int32), order // ids.shape[1]
    gathered = x[tokens]
    products = [torch._grouped_mm(gathered, matrices.transpose(1, 2), offs=ends) for matrices in first]
    gate, up = (half for product in products for half in product.chunk(2 // len(first), -1))
    each = torch._grouped_mm(silu(gate) * up, down, offs=ends)
    return torch.zeros_like(x).index_add_(0, tokens, each * weights.flatten()[order, None].to(x.dtype))


def once(make: Callable[[Any], Side], layer: Layer | Scaled) -> Side:
    """A side whose maker is asked at its first call, so that one which cannot be made is a row that says why."""
    made = functools.lru_cache(maxsize=1)(lambda: make(layer))
    return lambda c: made()(c)


def sides(layer: Layer, tokens: int, blocks: tuple[int, ...]) -> dict[str, Side]:
    """Every side by name, as functions of a call."""

    def ours(block: int) -> Side:
        return lambda c: mt.experts(c.x, c.ids, c.weights, layer.gate_up, layer.down, block=block)

    def gathered(c: Routed) -> torch.Tensor:
        return mt.expert_down(mt.expert_gate_up(c.x, layer.gate_up, c.ids), layer.down, c.ids, c.weights)

    found = {f"moekit, block {block}": ours(block) for block in blocks if block > 1 or tokens <= FEW}
    if tokens <= GATHERED:
        found["moekit, gathered"] = gathered
    found["torch grouped"] = lambda c: grouped([layer.gate_up], layer.down, c)
    halves = [half.contiguous() for half in layer.gate_up.chunk(2, 1)]
    found["torch grouped, three products"] = lambda c: grouped(halves, layer.down, c)
    return found | {name: once(make, layer) for name, make in experts_peers.DENSE.items()}


def scaled_sides(layer: Scaled, tokens: int, blocks: tuple[int, ...]) -> dict[str, Side]:
    """`sides` of float8 weights."""

    def ours(block: int) -> Side:
        return lambda c: mt.scaled_experts(c.x, c.ids, c.weights, *layer, block=block)

    def gathered(c: Routed) -> torch.Tensor:
        activated = mt.scaled_expert_gate_up(c.x, layer.gate_up, layer.gate_up_scale, c.ids)
        return mt.scaled_expert_down(activated, layer.down, layer.down_scale, c.ids, c.weights)

    def rounded(block: int) -> Side:
        def call(c: Routed) -> torch.Tensor:
            kind = str(c.x.dtype).removeprefix("torch.")
            return mt.quantised_experts(*mt.quantised(c.x), c.ids, c.weights, *layer, block=block, dtype=kind)

        return call

    found = {f"{FLOAT8}block {block}": ours(block) for block in blocks if block > 1 or tokens <= FEW}
    found |= {f"{FLOAT8}rounded x, block {block}": rounded(block) for block in blocks if block > 1}
    found |= {f"{FLOAT8}gathered": gathered} if tokens <= GATHERED else {}
    return found | {f"{FLOAT8}{name}": once(make, layer) for name, make in experts_peers.FLOAT8.items()}


def relative(layer: Layer | Scaled, call: Routed, out: torch.Tensor) -> float:
    """The larger ‖out − float64‖ / ‖float64‖ of the first and the last row."""
    worst = 0.0
    if isinstance(layer, Scaled):
        rows = torch.tensor(sorted({0, len(call.x) - 1}), device=out.device)
        known, numbers = call.ids[rows].long().unique(return_inverse=True)
        call, out, layer = Routed(call.x[rows], numbers.int(), call.weights[rows]), out[rows], layer.of(known).wide
    for t in {0, len(call.x) - 1}:
        want = torch.zeros(out.shape[1], dtype=torch.float64, device=out.device)
        for e, share in zip(call.ids[t].tolist(), call.weights[t].double(), strict=True):
            gate, up = (layer.gate_up[e].double() @ call.x[t].double()).chunk(2)
            each = (silu(gate) * up).to(out.dtype).double() @ layer.down[e].double()
            want += share * each.to(out.dtype).double()
        worst = max(worst, float((out[t].double() - want).norm() / want.norm()))
    return worst


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """Tokens by width."""
    for width in args.widths:
        for t in args.tokens:
            head = {"case": f"experts {width}", "T": t, "dtype": args.dtype}
            yield head, (width, t, args.dtype, args.blocks, args.rounds, args.float8, args.smoke)


@torch.no_grad()
def measure(
    width: int, tokens: int, dtype: str, blocks: tuple[int, ...], rounds: int, float8: bool = False, small: bool = False
) -> list[dict]:
    """One row per side."""
    experts, top_k, hidden = (8, 2, 64) if small else (EXPERTS, TOP_K, HIDDEN)
    kind = getattr(torch, dtype)
    gate_up = weight(experts * 2 * width, hidden, kind).view(experts, 2 * width, hidden)
    layer = Layer(gate_up, weight(experts * width, hidden, kind).view(experts, width, hidden))
    calls = [drawn(tokens, hidden, experts, top_k, kind) for _ in range(CALLS[tokens <= FEW])]
    distinct = sum(len(c.ids.unique()) for c in calls) / len(calls)
    floor = distinct * 3 * width * hidden * kind.itemsize / COPY / 1e6
    made = sides(layer, tokens, blocks)
    short = Scaled.drawn(experts, width, hidden) if float8 else None
    made |= scaled_sides(short, tokens, blocks) if short else {}

    def prepare(side: str) -> tuple[dict, object]:
        error = relative(short if short and side.startswith(FLOAT8) else layer, calls[0], made[side](calls[0]))
        return {"relative": round(error, 5)}, captured([lambda c=c: made[side](c) for c in calls])

    found = runner.beside(made, prepare, lambda graphs: replayed(graphs, rounds))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    def share(row: dict) -> dict:
        own = floor / kind.itemsize if row["side"].startswith(FLOAT8) else floor
        return {"of floor": round(own / row["us"], 3)} if "us" in row else {}

    return [{**r, "distinct": distinct, **share(r)} for r in found]


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--tokens 3 --widths 16 --blocks 1,16 --dtype float32 --float8 --rounds 1",
    options=(
        runner.Option("tokens", (1, 4, 16, 64, 256, 1024, 4096)),
        runner.Option("widths", (512, 256, 64), "the experts' intermediate size on a rank"),
        runner.Option("blocks", (1, 16, 64, 128), "pairs in a block; 1 sorts nothing"),
        runner.Option("float8", False, "sides with float8 weights, too"),
        runner.DTYPE,
        runner.ROUNDS,
    ),
    columns=("us", "of floor", "relative"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
