"""A decode step of Hugging Face's Qwen3-Next, patched and not: a model of real width and a few layers, random weights.

    python bench/patched_model.py [--layers 4] [--batch 1 16 64] [--json FILE]

Both sides in one process, on one model (patched, then unpatched, then patched again), the same prompts, bfloat16, no graph:
what a user of `generate` waits for. `step` is the median host time of a synchronised step, `gpu` the median time between CUDA
events around it, `launches` what the profiler counts of kernels in one step. Logits are compared
beside the times. `--small`: narrow layers.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Iterator

import torch

sys.path.insert(0, __file__.rpartition("/bench/")[0])

import moekit.torch as mt
from bench import runner
from bench.cases import DEVICE
from bench.device_torch import awaited, launches

SMALL = {
    "vocab_size": 512, "hidden_size": 256, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
PROMPT = 16
OPTIONS = (
    runner.Option("layers", 4),
    runner.Option("batch", (1, 16, 64)),
    runner.Option("small", False, "narrow layers, which a CPU can do"),
)


@functools.cache
def build(layers: int, small: bool):
    """`layers` layers of Qwen3-Next-80B-A3B's widths, or narrow ones, with random bfloat16 weights; the process keeps it."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {"num_hidden_layers": layers, "vocab_size": 32768} | (SMALL if small else {})
    config = Qwen3NextConfig(**sizes)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = Qwen3NextForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    return model


def prompts(model, batch: int) -> torch.Tensor:
    """Random tokens, the same for one batch."""
    drawn = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    return drawn.to(DEVICE)


@torch.no_grad()
def decode(model, batch: int, steps: int) -> tuple[dict, torch.Tensor]:
    """Times of a decode step after a short prompt, and the prompt's logits."""
    out = model(prompts(model, batch), use_cache=True)
    first, token = out.logits[:, -1].float(), out.logits[:, -1:].argmax(-1)
    step = functools.partial(model, past_key_values=out.past_key_values, use_cache=True)
    host, gpu = [], []
    for _ in range(steps):
        out, host_ms, gpu_ms = awaited(functools.partial(step, token))
        host.append(host_ms)
        gpu.append(gpu_ms)
        token = out.logits[:, -1:].argmax(-1)
    medians = {"step_ms": host, "gpu_ms": gpu}
    found = {name: round(statistics.median(times[steps // 4 :]), 3) for name, times in medians.items()}
    return found | {"launches": launches(functools.partial(step, token))}, first


@torch.no_grad()
def measure(layers: int, small: bool, batch: int, steps: int) -> list[dict]:
    """One row for the patched model, one for the original and one for the patched model again."""
    model, rows, logits = build(layers, small), [], []
    mt.patch(model)
    decode(model, batch, steps)  # the first pass at a batch is several times slower on either side: not shown
    for way in ("patched", "original", "patched again"):
        (mt.unpatch if way == "original" else mt.patch)(model)
        decode(model, batch, min(steps, 4))
        times, first = decode(model, batch, steps)
        rows.append({"way": way} | times)
        logits.append(first)
    difference = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    return [row | {"relative_difference": round(difference, 5)} for row in rows]


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per batch."""
    for batch in args.batch:
        yield {"batch": batch}, (args.layers, args.small, batch, args.steps)


def begin(args: argparse.Namespace) -> dict:
    """What the patch leaves."""
    model = build(args.layers, args.small)
    report = mt.patch(model)
    print(report)
    return {"layers": args.layers, "left": report.left}


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--small --layers 4 --batch 1 --steps 1",
    options=(*OPTIONS, runner.Option("steps", 40)),
    begin=begin,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
