"""How long a layer's gated delta rule over prompts takes in JAX: chunk after chunk by moekit's kernels, all at once by XLA.

    python bench/delta_rule_jax.py [--prompts 1x512,1x8192,8x1024] [--heads 8,16] [--json FILE]

What stands between a delta net's convolution and its gated norm, of as many key and value heads of 128 as one of two ranks of
the 80B has; `kernels` are µs of each by name. `relative` is the distance from XLA's: of what is read, which is bfloat16, or of
the state, whichever is larger.
"""

import argparse
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.device_jax import timed
from moekit.models.qwen3next.gdn import remembered
from moekit.models.qwen3next.kernels import named

KINDS = ("pallas", "xla")


def measure(batch: int, length: int, heads: tuple[int, int], rounds: int, small: bool) -> list[dict]:
    """One row per kind of kernels."""
    (keys, values), dim = heads, 8 if small else 128
    config = SimpleNamespace(linear_key_head_dim=dim, linear_value_head_dim=dim)
    weights = {"A_log": jnp.zeros(values), "dt_bias": jnp.zeros(values)}
    convolved, gates = (
        jax.random.normal(jax.random.key(i), (batch, length, width), jnp.bfloat16)
        for i, width in enumerate(((2 * keys + values) * dim, 2 * values))
    )
    given = convolved, gates, jnp.ones((batch, length, 1), bool)

    def of(kind: str):
        return jax.jit(lambda *given: remembered(*given, None, weights, config, named(kind)))

    wanted = [np.asarray(x, np.float64) for x in of("xla")(*given)]

    def prepare(kind: str) -> tuple[dict, object]:
        call = of(kind)
        got = [np.asarray(x, np.float64) for x in call(*given)]
        off = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, wanted, strict=True))
        return {"relative": float(f"{off:.2g}")}, lambda: call(*given)

    return runner.beside(KINDS, prepare, lambda ready: timed(ready, 1, rounds))


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per shape of prompts."""
    for prompts in args.prompts:
        batch, length = map(int, prompts.split("x"))
        head = {"case": "delta rule", "prompts": f"{batch} × {length}", "dtype": "bfloat16"}
        yield head, (batch, length, args.heads, args.rounds, args.smoke)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--prompts 1x6 --heads 1,2 --rounds 1",
    options=(
        runner.Option("prompts", ("1x64", "1x512", "1x2048", "1x8192", "8x1024"), "how many x how long"),
        runner.Option("heads", (8, 16), "of keys and of values"),
        runner.ROUNDS,
    ),
    columns=("us", "relative"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
