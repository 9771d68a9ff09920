"""The work behind `moekit decode`: a checkpoint, a mesh, two runs and what served them. It imports jax."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from moekit import __version__
from moekit.errors import UnavailableError
from moekit.models.qwen3next import (
    TINY,
    Config,
    ConfigError,
    Generation,
    Model,
    Progress,
    Room,
    greedy_step,
    prefill,
    write_random_checkpoint,
)
from moekit.models.qwen3next.config import check_tensor_parallel
from moekit.models.qwen3next.generate import CACHE_BUCKET, PROMPT_BUCKET, generate, padded
from moekit.models.qwen3next.kernels import FUSIONS


def tiny_checkpoint() -> Path:
    """The tiny random checkpoint in the user's cache directory, written if it is not there yet."""
    try:
        import platformdirs
    except ModuleNotFoundError:
        raise UnavailableError(
            "platformdirs, which knows the user's cache directory, is not installed; install moekit[cli] or give --checkpoint"
        ) from None
    key = hashlib.sha256(repr((__version__, TINY)).encode()).hexdigest()[:8]
    cache = Path(platformdirs.user_cache_dir("moekit"))
    directory = cache / f"qwen3-next-tiny-{key}"
    try:
        if not directory.is_dir():
            _write_tiny(cache, directory)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UnavailableError(
            f"the tiny checkpoint cannot be written to {cache} ({why}); set XDG_CACHE_HOME to a folder that can be written, or "
            "give --checkpoint"
        ) from None
    return directory


def keep_programs() -> None:
    """Keep compiled programs in the user's cache directory, where the next command finds them; jax only warns if it cannot."""
    if jax.config.jax_compilation_cache_dir is None:
        import platformdirs

        jax.config.update("jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("moekit")) / "programs"))


def rounded(length: int) -> int:
    """A cache's length with room for so many tokens, of a few sizes so that compiled programs are found again."""
    return -(-length // CACHE_BUCKET) * CACHE_BUCKET


def _write_tiny(cache: Path, directory: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        written = write_random_checkpoint(Path(scratch) / directory.name)
        try:
            os.rename(written, directory)  # whole or not at all, also when two commands start at once
        except OSError:
            if not directory.is_dir():
                raise


def serves(config: Config, tp: int) -> bool:
    """Whether the model can be shared by `tp` ranks."""
    try:
        check_tensor_parallel(config, tp)
    except ConfigError:
        return False
    return True


def largest_tp(config: Config, devices: int) -> int:
    """The most ranks, of `devices`, that the model can be shared by."""
    return max(tp for tp in range(1, devices + 1) if serves(config, tp))


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
    return generate(model, prompts, max_new_tokens=new_tokens, eos=ends, kernels=kernels, progress=progress)


def served(model: Model, batch: int, kernels: str) -> dict[str, dict[str, Any]]:
    """For each fusion how many kernels of it one decode step calls, read off the step as jax traced it.

    A fusion of which it calls no kernel is served by array evaluation; the gate, then, is three products, and experts are
    XLA's own, as they are for many tokens.
    """
    calls = _kernel_calls(model, batch, kernels)
    kind = "pallas, interpreted" if _interpreted() else "pallas"
    return {name: {"implementation": kind if calls[name] else "xla", "kernels": calls[name]} for name in FUSIONS}


def _interpreted() -> bool:
    return devices()[0].platform == "cpu"


def _kernel_calls(model: Model, batch: int, kernels: str) -> Counter[str]:
    """Pallas calls of a traced decode step, by the fusion that each kernel is named after."""
    ids = jax.ShapeDtypeStruct((batch, PROMPT_BUCKET), np.int32)
    lengths = jax.ShapeDtypeStruct((batch,), np.int32)
    _, cache = jax.eval_shape(lambda m, t, n: prefill(m, t, n, cache_length=CACHE_BUCKET, kernels=kernels), model, ids, lengths)
    step = greedy_step.trace(model, lengths, cache, kernels=kernels)
    names = _pallas_names(step.jaxpr.jaxpr)
    return Counter(next((f for f in FUSIONS if name.startswith(f)), name) for name in names)


def _pallas_names(jaxpr: Any) -> list[str]:
    """The kernel name of every pallas_call in a jaxpr and in those inside it: the compiled one; a CPU interprets the same."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            if not eqn.params["interpret"]:
                found.append(eqn.params["name"])
            continue
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                found += _pallas_names(getattr(inner, "jaxpr", inner))
    return found


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
