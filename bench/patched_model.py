"""A decode step of Hugging Face's Qwen3-Next, patched and not: a model of real width and a few layers, random weights.

    python bench/patched_model.py [--layers 4] [--batch 1 16 64] [--json FILE]

Both sides in one process, on one model (patched, then unpatched, then patched again), the same prompts, bfloat16, no graph:
what a user of `generate` waits for. `step` is the median host time of a synchronised step, `gpu` the median time between CUDA
events around it, `launches` what the profiler counts of kernels in one step. Logits are compared beside the times.
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


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/patched_model.py needs a CUDA device")
    model, rows = build(options.layers), []
    print(report := mt.patch(model))
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
        write(options.json, environment() | {"layers": options.layers, "left": report.left, "rows": rows})


if __name__ == "__main__":
    main()
