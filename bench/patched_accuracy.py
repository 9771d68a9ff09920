"""How far Hugging Face's Qwen3-Next in bfloat16 is from its float32 self, patched and not: random weights, one prompt's logits.

    python bench/patched_accuracy.py [--batch 1 16 64] [--small] [--json FILE]

All sides have the same weights, rounded to bfloat16. `original` and `patched` run in bfloat16, the truth is the original in
float32 (IEEE products). A router that sees logits a little off may choose another expert, which moves a row by far more than
any rounding does; so both sides run once more with the truth's experts (`same experts`), weighted by their own logits. `other`
is the share of tokens, over all layers, for which some expert is not the truth's. `apart`: the two sides from each other.
`--small`: a narrow model, which a CPU can do.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import moekit.torch as mt
from bench.common import environment, write
from bench.patched_model import build

VOCABULARY, PROMPT = 32768, 16
SMALL = {
    "hidden_size": 256, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


def routers(model) -> list:
    """The modules that choose experts, in order."""
    return [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]


@torch.no_grad()
def run(model, ids: torch.Tensor, experts: list | None = None) -> tuple[torch.Tensor, list]:
    """The last position's logits and the experts chosen by each router; `experts`: those to take instead."""
    chosen = []

    def hook(router, _, output):
        logits, weights, own = output
        chosen.append(own)
        if experts is None:
            return output
        wanted = experts[len(chosen) - 1]
        share = logits.float().softmax(-1).gather(-1, wanted)
        return logits, (share / share.sum(-1, keepdim=True)).to(weights.dtype), wanted

    hooks = [r.register_forward_hook(hook) for r in routers(model)]
    try:
        return model(ids).logits[:, -1].double(), chosen
    finally:
        for h in hooks:
            h.remove()


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """‖x − truth‖ / ‖truth‖."""
    return float(f"{((x - truth).norm() / truth.norm()).item():.3g}")


def other(chosen: list, truth: list) -> float:
    """The share of tokens, over all layers, for which some expert is another."""
    differ = torch.cat([(a.sort(-1)[0] != b.sort(-1)[0]).any(-1) for a, b in zip(chosen, truth, strict=True)])
    return round(differ.float().mean().item(), 3)


def measure(model, exact, batch: int) -> list[dict]:
    """One row for the original and one for the patched model, and how far they are from each other."""
    device = next(model.parameters()).device
    ids = torch.randint(0, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).to(device)
    truth, experts = run(exact, ids)
    rows, free, pinned = [], [], []
    for way in ("original", "patched"):
        (mt.patch if way == "patched" else mt.unpatch)(model)
        (logits, chosen), (same, _) = run(model, ids), run(model, ids, experts)
        free.append(logits)
        pinned.append(same)
        rows.append({"batch": batch, "way": way, "error": error(logits, truth), "other": other(chosen, experts),
                     "same experts": error(same, truth)})  # fmt: skip
    apart = {"apart": error(free[1], free[0]), "apart, same experts": error(pinned[1], pinned[0])}
    return [row | apart for row in rows]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.layers, device, **(SMALL if options.small else {}))
    exact = copy.deepcopy(model).float()
    exact.set_experts_implementation("eager")  # one product after the other: a grouped one may not be IEEE
    rows = [row for batch in options.batch for row in measure(model, exact, batch)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        write(options.json, environment() | {"layers": options.layers, "small": options.small, "rows": rows})


if __name__ == "__main__":
    main()
