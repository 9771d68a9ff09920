"""What the benches of the whole JAX model share: the 80B's widths, random weights drawn on the devices, clocks and floors.

`stream` and `alone` are by the host's clock, `profile` by the device's own (bench/device_jax.py). The floor of a call is what
its bytes take at the rate of a large copy, or its products' operations at that of a large product, both measured in the run.
A process measures one case after the other with the same weights: JAX's profiler and PyTorch's CUDA context are not for one.
"""

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.device_jax import alone, profiled, totals
from bench.runner import DTYPE, Option
from moekit.models.qwen3next import TINY, Config, Model, abstract_model
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.fp8 import Float8
from moekit.models.qwen3next.sharding import MIXERS, ROUTED, SHARED

FULL_VOCABULARY = 151936
WIDTHS = replace(  # Qwen3-Next-80B-A3B, but for the vocabulary: four layers would be lost beside its head
    TINY,
    vocab_size=32768,
    hidden_size=2048,
    num_attention_heads=16,
    head_dim=256,
    rotary_dim=64,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)
COPIED = 2**30  # bytes
FLOAT8 = Float8(128, 128, frozenset((*ROUTED, *SHARED, *MIXERS[GDN], *MIXERS[ATTENTION])))


CODES = 64.0  # about as large are random codes
PATIENCE = 1500  # seconds for a case, the first of which draws and compiles
OPTIONS = (
    Option("layers", 4, "every fourth is attention, the others gated delta nets"),
    Option("tp", 1, "devices"),
    Option("vocab", "32768", "a number, or full: 151936"),
    DTYPE,
    Option("weights", "", "float8_e4m3fn: of experts and projections, a scale for 128 × 128", ("", "float8_e4m3fn")),
    Option("small", False, "narrow layers, which a CPU can do"),
)
SMOKE = "--small --layers 1 --vocab 512 --dtype float32 --kinds xla"


@dataclass(frozen=True)
class Setting:
    """Which model is measured: what the options of a command line say."""

    layers: int
    tp: int
    vocab: str
    dtype: str
    small: bool
    weights: str = ""

    def head(self, of: str) -> dict:
        """What begins a row: what it is of, and of how many devices."""
        return {"case": f"{of}, {self.layers} layers", "tp": self.tp, "dtype": self.weights or self.dtype}


def setting_of(args: Namespace) -> Setting:
    """The setting of a command line."""
    return Setting(args.layers, args.tp, args.vocab, args.dtype, args.small, args.weights)


@functools.cache
def model_of(setting: Setting) -> Model:
    """A model with random weights; the process keeps it."""
    config = configuration(setting.layers, setting.vocab, TINY if setting.small else WIDTHS)
    return random_model(replace(config, float8=FLOAT8 if setting.weights else None), mesh_of(setting.tp), setting.dtype)


def configuration(layers: int, vocabulary: str, widths: Config = WIDTHS) -> Config:
    """So many layers, every fourth of them attention; `vocabulary`: a number, or `full`."""
    kinds = tuple(ATTENTION if i % 4 == 3 else GDN for i in range(layers))
    size = FULL_VOCABULARY if vocabulary == "full" else int(vocabulary)
    return replace(widths, layer_types=kinds, vocab_size=size)


def mesh_of(tp: int) -> Mesh:
    """The first devices; raises ValueError where there are fewer."""
    if len(jax.devices()) < tp:
        raise ValueError(f"--tp {tp}: there are {len(jax.devices())} devices; take fewer, or a machine with more")
    return Mesh(np.array(jax.devices()[:tp]), ("tp",))


def drawn(like: Any, key: jax.Array) -> Any:
    """Random numbers of the shapes of a tree, each where it belongs; matrices are scaled by their last axis, integers zero."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([_drawer(x.shape, x.dtype, x.sharding)(k) for k, x in zip(keys, leaves, strict=True)])


@partial(jax.jit, static_argnums=(1, 2))
def _numbers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    if jnp.dtype(dtype).itemsize == 1:  # codes all over their range; their scales make them as large as others are
        return (jax.random.normal(key, shape, jnp.bfloat16) * CODES).astype(dtype)
    scale = 0.5 if len(shape) == 1 else shape[-1] ** -0.5
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


def _drawer(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[jax.Array], jax.Array]:
    known = shape, jnp.dtype(dtype), sharding
    if known not in _drawers:
        _drawers[known] = jax.jit(lambda key: _numbers(key, shape, jnp.dtype(dtype)), out_shardings=sharding)
    return _drawers[known]


_drawers: dict[Any, Callable[[jax.Array], jax.Array]] = {}


def random_model(config: Config, mesh: Mesh, dtype: str) -> Model:
    """A model with random weights."""
    params = drawn(abstract_model(config, mesh, dtype).params, jax.random.key(0))
    layers = params["layers"]
    wide = layers.small * (0.5 * layers.small.shape[-1] ** 0.5)  # rows of vectors and a convolution's taps, no matrix
    even = config.hidden_size**-0.5 / CODES
    stacks = {name: jnp.full_like(a, even) if a.dtype == jnp.float32 else a for name, a in layers.stacks.items()}
    return Model(params | {"layers": replace(layers, small=wide, stacks=stacks)}, config, mesh)


def stream(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """ms a call of several dispatched one after the other, and ms that the host takes to dispatch one of them."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    for _ in range(calls):
        last = call()
    dispatched = time.perf_counter()
    jax.block_until_ready(last)
    return (time.perf_counter() - begin) / calls * 1e3, (dispatched - begin) / calls * 1e3


def profile(call: Callable[[], Any], calls: int) -> dict[str, list[float]]:
    """By name what the first device's kernels of a call are: how many, and µs of them all; none where there is no GPU."""
    jax.block_until_ready(call())
    found = profiled(lambda: [jax.block_until_ready(call()) for _ in range(calls)], device=0)
    return {name: [round(n, 2), round(us, 2)] for name, (n, us) in totals(found, calls).items()}


def clocked(call: Callable[[], Any], program: jax.stages.Compiled, in_a_stream: int, awaited: int, profiles: int) -> dict:
    """What a call of a model takes, by both clocks, and where; `by name` are its kernels."""
    ms, dispatch = stream(call, in_a_stream)
    found = {"ms": round(ms, 3), "us": round(ms * 1e3, 1), "dispatch ms": round(dispatch, 3)}
    found |= {"alone ms": round(alone(call, awaited), 3)} | memory(program)
    kernels = profile(call, profiles)
    launches, us = (sum(column) for column in zip((0, 0.0), *kernels.values(), strict=True))
    return found | {"kernels": round(launches), "kernels ms": round(us / 1e3, 3), "by name": kernels}


def memory(program: jax.stages.Compiled) -> dict[str, float]:
    """GiB on a device: arguments (weights and state), temporaries, and most in use since the process began."""
    stats = program.memory_analysis()
    peak = max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.devices())
    sizes = {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes, "peak": peak}
    return {f"{name} GiB": round(size / 2**30, 3) for name, size in sizes.items()}


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of the kernels of a call, by the device's clock; the mean of a few. Without a GPU, of a call."""
    return sum(us for _, us in profile(call, 5).values()) / 1e6 or alone(call, 1) / 1e3


def _large(*shape: int) -> jax.Array:
    """Random numbers; few of them where there is no GPU."""
    shape = shape if jax.default_backend() == "gpu" else tuple(n // 64 for n in shape)
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


@functools.cache
def copy_rate() -> float:
    """TB/s, read and written, of a kernel that reads 1 GiB and writes as much on one device."""
    source, negated = _large(COPIED // 2), jax.jit(lambda x: -x)
    return 2 * source.nbytes / _seconds(lambda: negated(source)) / 1e12


@functools.cache
def product_rate() -> float:
    """TFLOP/s of a large bfloat16 product of random numbers on one device."""
    a, b = _large(4096, 8192), _large(8192, 8192)
    multiplied = jax.jit(lambda a, b: a @ b)
    return 2 * a.size * b.shape[1] / _seconds(lambda: multiplied(a, b)) / 1e12


def moved(config: Config, tp: int, tokens: int, sequences: int, held: int, dtype: str) -> dict[str, float]:
    """Bytes that one device must move in a call, by what they are of; `held`: tokens that each sequence has in its cache.

    Each weight is read once; of routed experts those that are chosen where choices are even and independent; a recurrent
    state is read and written; keys and values are read.
    """
    c, size = config, jnp.dtype(dtype).itemsize
    hidden, layers = c.hidden_size, len(c.layer_types)
    deltas = c.layer_types.count(GDN)
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    kv = c.num_key_value_heads * c.head_dim
    experts = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** tokens)
    attentions, heads = layers - deltas, c.num_attention_heads * c.head_dim
    matrices = {
        "experts": layers * experts * 3 * c.moe_intermediate_size * hidden / tp,
        "gates": layers * (c.num_experts + 1) * hidden,
        "shared experts": layers * 3 * c.shared_expert_intermediate_size * hidden / tp,
        "delta nets": deltas * (2 * keys + 3 * values + 2 * c.linear_num_value_heads) * hidden / tp,
        "attention": attentions * (3 * heads + 2 * kv * max(1, tp / c.num_key_value_heads)) * hidden / tp,
        "head": c.vocab_size * hidden / tp,
    }
    kept = {} if c.float8 is None else dict.fromkeys(("experts", "shared experts", "delta nets", "attention"), 1)
    found = {name: n * kept.get(name, size) for name, n in matrices.items()}
    found["gates"] += found.pop("shared experts")
    state = 4 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    found["states"] = deltas * sequences * 2 * state / tp
    found["keys and values"] = attentions * sequences * held * 2 * kv * max(1 / tp, 1 / c.num_key_value_heads) * size
    return found


def operations(config: Config, tp: int, tokens: int) -> float:
    """Operations of one device in the products with weights of a call on so many tokens, the head's of one left out."""
    c = config
    hidden, deltas = c.hidden_size, c.layer_types.count(GDN)
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    mixture = 3 * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size) + c.num_experts * tp
    mixers = deltas * (2 * keys + 3 * values) + (len(c.layer_types) - deltas) * (3 * heads + 2 * kv)
    return 2.0 * tokens * (len(c.layer_types) * mixture + mixers) * hidden / tp
