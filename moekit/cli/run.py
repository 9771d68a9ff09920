"""The work behind `moekit decode`: a checkpoint, a mesh, two runs and what served them. It imports jax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moekit.errors import UnavailableError
from moekit.jax.doors import DOORS, refusal
from moekit.models.qwen3next import Config, ConfigError, Generation, Model, Progress, Room, greedy_step, prefill
from moekit.models.qwen3next.config import check_tensor_parallel
from moekit.models.qwen3next.exchanged import channel_of
from moekit.models.qwen3next.generate import CACHE_BUCKET, PROMPT_BUCKET, generate, padded
from moekit.models.qwen3next.kernels import FUSIONS


def keep_programs() -> None:
    """Keep compiled programs in the user's cache directory, where the next command finds them; jax only warns if it cannot."""
    if jax.config.jax_compilation_cache_dir is None:
        import platformdirs

        jax.config.update("jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("moekit")) / "programs"))


def rounded(length: int) -> int:
    """A cache's length with room for so many tokens, of a few sizes so that compiled programs are found again."""
    return -(-length // CACHE_BUCKET) * CACHE_BUCKET


def serves(config: Config, tp: int) -> bool:
    """Whether the model can be shared by `tp` ranks."""
    try:
        check_tensor_parallel(config, tp)
    except ConfigError:
        return False
    return True


def largest_tp(config: Config, devices: int) -> int:
    """The most ranks, of `devices`, that the model can be shared by; 1 where its `ep` allows none."""
    return max((tp for tp in range(1, devices + 1) if serves(config, tp)), default=1)


def devices() -> list[Any]:
    """What a model can be shared by: GPUs if there are any, else virtual CPU devices."""
    return jax.devices()


def mesh_of(tp: int) -> Mesh:
    """The first `tp` devices as the axis that the model is cut over."""
    return Mesh(np.array(devices()[:tp]), ("tp",))


def room(prompts: Sequence[Sequence[int]], new_tokens: int) -> Room:
    """The cache that `generate` makes for prompts and as many new tokens."""
    tokens, _, length = padded(prompts, new_tokens)
    return Room(len(prompts), length, tokens.shape[1])


def random_prompts(config: Config, batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of `length` token ids; the same ones every time."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).tolist()


def run(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    kernels: str,
    progress: Callable[[Progress], None],
) -> Generation:
    """Decode with one kind of kernels, up to a token of `ends`."""
    channel, _ = channel_of(model.mesh, len(prompts), model.config.hidden_size, kernels)
    return generate(model, prompts, max_new_tokens=new_tokens, eos=ends, kernels=kernels, progress=progress, channel=channel)


def check_kernels(*kernels: str | None) -> None:
    """Raise UnavailableError for named kernels that do not get into a JAX program here."""
    for name in kernels:
        if name in DOORS and (why := refusal(name)):
            raise UnavailableError(f"--kernels {name}: {why}")


def served(model: Model, batch: int, kernels: str) -> dict[str, dict[str, Any]]:
    """For each fusion how many kernels of it one decode step calls, read off the step as jax traced it.

    A fusion of which it calls no kernel is served by array evaluation; the gate, then, is three products, and experts are
    XLA's own, as they are for many tokens.
    """
    calls = _kernel_calls(model, batch, kernels)
    found = {}
    for name in FUSIONS:
        ways = {kernels if way == "pallas" else way: n for (fusion, way), n in calls.items() if fusion == name}
        kind = " and ".join(ways) + (", interpreted" if _interpreted() else "")
        found[name] = {"implementation": kind if ways else "xla", "kernels": sum(ways.values())}
    return found


def _interpreted() -> bool:
    return devices()[0].platform == "cpu"


def _kernel_calls(model: Model, batch: int, kernels: str) -> Counter[tuple[str, str]]:
    """Kernels that a traced decode step calls, by the fusion that each is named after and the way it goes."""
    ids = jax.ShapeDtypeStruct((batch, PROMPT_BUCKET), np.int32)
    lengths = jax.ShapeDtypeStruct((batch,), np.int32)
    _, cache = jax.eval_shape(lambda m, t, n: prefill(m, t, n, cache_length=CACHE_BUCKET, kernels=kernels), model, ids, lengths)
    channel, _ = channel_of(model.mesh, batch, model.config.hidden_size, kernels)
    by = {} if channel is None else {"link": channel.link}
    step = greedy_step.trace(model, lengths, cache, kernels=kernels, **by)
    names = _kernels(step.jaxpr.jaxpr)
    return Counter((next((f for f in FUSIONS if name.startswith(f)), name), way) for name, way in names)


def _kernels(jaxpr: Any) -> list[tuple[str, str]]:
    """The name and way of every kernel in a jaxpr and in those inside it: the compiled ones; a CPU interprets the same."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            if not eqn.params["interpret"]:
                found.append((eqn.params["name"], "pallas"))
            continue
        if eqn.primitive.name in ("triton_call", "mosaic_call"):
            found.append((eqn.params["program"].name, eqn.primitive.name.removesuffix("_call")))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                found += _kernels(getattr(inner, "jaxpr", inner))
    return found


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
