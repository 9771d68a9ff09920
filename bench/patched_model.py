"""A decode step of Hugging Face's Qwen3-Next, patched and not: a model of real width and a few layers, random weights.

    python bench/patched_model.py [--layers 4] [--batch 1 16 64] [--check] [--json FILE]

Both sides in one process, on one model (patched, then unpatched, then patched again), the same prompts, bfloat16, no graph:
what a user of `generate` waits for. `step` is the median host time of a synchronised step, `gpu` the median time between CUDA
events around it, `launches` what the profiler counts of kernels in one step. Logits are compared beside the times. `check`
is the host time per layer of asking whether everything that a block and the layer around it read around is still plain: the
median over many calls. `--check` measures that alone, on any device, on narrow layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

import moekit.torch as mt
from bench.common import environment, write

NARROW = {
    "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def build(layers: int, device: str = "cuda", **widths: int):
    """`layers` layers of Qwen3-Next-80B-A3B's widths, or of those given, with random bfloat16 weights."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(num_hidden_layers=layers, vocab_size=32768, **widths)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3NextForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    return model


@torch.no_grad()
def decode(model, batch: int, steps: int) -> dict:
    """Times of a decode step after a short prompt."""
    ids = torch.randint(0, 32768, (batch, 16), device="cuda", generator=torch.Generator("cuda").manual_seed(batch))
    out = model(ids, use_cache=True)
    prompt_logits, cache = out.logits[:, -1].float(), out.past_key_values
    token = prompt_logits.argmax(-1, keepdim=True)
    host, gpu = [], []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        out = model(token, past_key_values=cache, use_cache=True)
        end.record()
        torch.cuda.synchronize()
        host.append((time.perf_counter() - start) * 1e3)
        gpu.append(begin.elapsed_time(end))
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
    kernels = sum(e.count for e in seen.key_averages() if e.device_type.name == "CUDA" and "mem" not in e.key.lower())
    warm = steps // 4
    return {
        "step_ms": round(statistics.median(host[warm:]), 3),
        "gpu_ms": round(statistics.median(gpu[warm:]), 3),
        "launches": kernels,
        "logits": prompt_logits,
    }


@torch.no_grad()
def check(model, calls: int = 2000, each: int = 20) -> dict[str, float]:
    """Host µs per layer of what a patched model asks at each call, for a block, for a norm's input, and for a whole layer."""
    from moekit.torch.huggingface.modules import Patched, records
    from moekit.torch.huggingface.plain import alike, usual

    layer = model.model.layers[0]
    block, after = layer.mlp, layer.post_attention_layernorm
    x = torch.zeros_like(after.weight)[None, None]

    def of_block():
        return not block.training and usual(x) and not records(block, x) and block.plain_weights(x)

    def of_norm():
        return usual(x) and alike(x, after._parameters.get("weight"))

    found = {}
    for name, ask in (("block", of_block), ("norm", of_norm)):
        if not ask():
            raise SystemExit(f"bench/patched_model.py: the {name} of layer 0 is not plain")
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            for _ in range(each):
                ask()
            times.append((time.perf_counter() - start) / each * 1e6)
        found[name] = round(statistics.median(times), 2)
    others = sum(isinstance(m, Patched) for m in layer.modules()) - 2  # all but block and router ask as norms do
    return found | {"layer": round(found["block"] + others * found["norm"], 2)}


def report_check(asked: dict[str, float], path: str | None = None) -> dict[str, float]:
    """Print the cost of the check, and write it if there is a path."""
    print("check: " + ", ".join(f"{us} µs a {name}" for name, us in asked.items()))
    if path:
        write(path, environment() | {"check_us": asked})
    return asked


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.check:
        model = build(1, "cuda" if torch.cuda.is_available() else "cpu", **NARROW)
        mt.patch(model)
        report_check(check(model), options.json)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench/patched_model.py needs a CUDA device")
    model, rows = build(options.layers), []
    print(report := mt.patch(model))
    asked = report_check(check(model))
    for batch in options.batch:
        decode(model, batch, options.steps)  # the first pass at a batch is several times slower on either side: not shown
        for way in ("patched", "original", "patched again"):
            (mt.unpatch if way == "original" else mt.patch)(model)
            decode(model, batch, 4)
            rows.append({"batch": batch, "way": way, **decode(model, batch, options.steps)})
        first, second = rows[-3]["logits"], rows[-2]["logits"]
        difference = ((first - second).norm() / second.norm()).item()
        for row in rows[-3:]:
            del row["logits"]
            row["relative_difference"] = round(difference, 5)
            print(f"batch {batch:3d} {row['way']:14s} step {row['step_ms']:8.3f} ms  gpu {row['gpu_ms']:8.3f} ms  "
                  f"{row['launches']:5d} kernels  logits differ by {difference:.1e}")  # fmt: skip
    if options.json:
        write(options.json, environment() | {"layers": options.layers, "left": report.left, "check_us": asked, "rows": rows})


if __name__ == "__main__":
    main()
