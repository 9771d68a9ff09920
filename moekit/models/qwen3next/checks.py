"""What the model's functions refuse, and what a compiled call does with what nobody could refuse.

Values that a host holds are checked before anything is compiled or placed. Values that only a device holds cannot raise:
a row that they spoil gets NaN logits and the token LOST, here and in every later step, and other rows are as they were.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moekit.errors import ArgumentError, DtypeError, ShapeError
from moekit.models.qwen3next.cache import Cache
from moekit.models.qwen3next.config import DTYPES, GDN, Config
from moekit.models.qwen3next.sharding import ROUTED

KEPT = (None, "auto", "float8_e4m3fn")  # what may be said of weights that files have in FP8
ACTIVATIONS = (None, "float8_e4m3fn")  # what may be said of what is multiplied by them
LOST = -1  # the token, and the length in a cache, of a row that has no answer any more


class Checked:
    """A jitted function whose arguments are checked at each call; `trace`, `lower` and the rest are the function's own."""

    def __init__(self, check: Callable[..., None], function: Any):
        functools.update_wrapper(self, function)
        self.check, self.function = check, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check, then call."""
        self.check(*args, **kwargs)
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["function"], name)


def checked(check: Callable[..., None]) -> Callable[[Any], Any]:
    """Decorate a jitted function with a check of its arguments."""
    return functools.partial(Checked, check)


def check_prefill(model: Any, tokens: Any, lengths: Any, *, cache_length: Any, **_: Any) -> None:
    """Refuse prompts that cannot be read. Concrete arrays are looked at, which waits for those that a device is computing."""
    _check_shapes("prefill", tokens, lengths)
    _index("prefill", "cache_length", cache_length)
    if cache_length < (size := tokens.shape[1]):
        raise ArgumentError(
            f"prefill: cache_length = {cache_length} is less than the {size} tokens of the prompt; give room for these "
            "and for each token to come"
        )
    _check_values("prefill", model, tokens, lengths)


def check_extend(model: Any, tokens: Any, lengths: Any, cache: Any, **_: Any) -> None:
    """Refuse pieces that cannot be read, as `check_prefill` does prompts."""
    _check_shapes("extend", tokens, lengths)
    check_cache("extend", model, cache)
    if tokens.shape[0] != (rows := cache.lengths.shape[0]):
        raise ShapeError(f"extend: tokens has shape {tokens.shape} and the cache {rows} rows; one row each is needed")
    _check_values("extend", model, tokens, lengths)


def check_step(model: Any, tokens: Any, cache: Any, **_: Any) -> None:
    """Refuse what a step cannot take. Only tokens in the host's memory are looked at: a step never waits for a device."""
    check_cache("decode step", model, cache)
    _integers("decode step", "tokens", tokens, 1, "[B]")
    if tokens.shape != cache.lengths.shape:
        batch = cache.lengths.shape[0]
        raise ShapeError(f"decode step: tokens has shape {tokens.shape} and the cache {batch} rows; one token a row is needed")
    if isinstance(tokens, np.ndarray):
        _in_vocabulary("decode step", model, tokens, np.True_)


def check_cache(where: str, model: Any, cache: Any) -> None:
    """Refuse what is no cache of this model."""
    if not isinstance(cache, Cache):
        raise ArgumentError(f"{where}: cache is a {type(cache).__name__}; what prefill or a step returned is needed")
    nets = model.config.layer_types.count(GDN)
    held = len(cache.deltas) if isinstance(cache.deltas, tuple) else cache.deltas.recurrent.shape[0]
    if (held, len(cache.attentions)) != (nets, model.config.num_layers - nets):
        raise ArgumentError(
            f"{where}: cache is of {held} delta nets and {len(cache.attentions)} attentions, the model has {nets} and "
            f"{model.config.num_layers - nets}; give the cache of this model"
        )


def spoiled_prompts(tokens: jax.Array, lengths: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """tokens [B, S] and lengths [B] with LOST in all places of a row whose length or a real token is wrong; padding is 0."""
    room = tokens.shape[1]
    real, lengths = jnp.arange(room)[None] < lengths[:, None], lengths.astype(jnp.int32)
    good = (lengths >= 1) & (lengths <= room) & (_known(tokens, vocabulary) | ~real).all(axis=1)
    tokens = jnp.where(real, tokens.astype(jnp.int32), 0)
    return jnp.where(good[:, None], tokens, LOST), jnp.where(good, lengths, LOST)


def spoiled_steps(tokens: jax.Array, cache: Cache, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """tokens [B] and the lengths [B] after them, with LOST where a row's token is wrong, its memory full, or it was lost."""
    lengths = cache.lengths
    good = _known(tokens, vocabulary) & (lengths >= 0)
    if cache.room is not None:
        good &= lengths < cache.room
    return jnp.where(good, tokens.astype(jnp.int32), LOST), jnp.where(good, lengths + 1, LOST)


def embedded(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows [T, H] of an embedding; NaN for what is no token of its vocabulary, LOST among them."""
    rows = jnp.take(table, tokens, axis=0, mode="clip")
    return jnp.where(_known(tokens, table.shape[0])[:, None], rows, jnp.nan)


def best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row of logits [B, V] the largest and its index, the lower of equals: [B] float32 and [B] int32.

    A row that holds NaN or an infinity gives infinity and LOST. One reduction makes both.
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape)
    finite = jnp.isfinite(logits)
    values, ids = jnp.where(finite, logits, jnp.inf), jnp.where(finite, ids, LOST)

    def larger(a: Any, b: Any) -> Any:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    start = np.array(-np.inf, values.dtype), np.array(np.iinfo(np.int32).max, np.int32)
    return jax.lax.reduce((values, ids), start, larger, (1,))


def kept_weights(where: str, weights: Any) -> str | None:
    """What is said of weights that files have in FP8. Raises ArgumentError for what is none of the words."""
    if weights not in KEPT:
        raise ArgumentError(f"{where}: weights is {weights!r}; it must be one of {', '.join(map(repr, KEPT))}")
    return weights


def activations(where: str, given: Any) -> str | None:
    """What is said of what weights in FP8 are multiplied by. Raises ArgumentError for what is none of the words."""
    if given not in ACTIVATIONS:
        raise ArgumentError(f"{where}: activations is {given!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}")
    return given


def multiplied(config: Config) -> None:
    """Refuse activations in float8 where no routed experts are."""
    if config.activations and not (config.float8 and {*ROUTED} <= config.float8.names):
        raise ArgumentError(
            f"load: activations is {config.activations!r}, which experts in float8 alone are multiplied by; give an FP8 "
            "checkpoint with weights='float8_e4m3fn', or leave activations out"
        )


def weight_dtype(where: str, dtype: Any) -> str | None:
    """The name of a dtype that weights may have; None stays None. Raises DtypeError for any other."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise DtypeError(f"{where}: dtype is {name!r}; it must be one of {', '.join(DTYPES)}, or None for the one it has")
    return name


def token_ids(name: str, given: Any, vocabulary: int) -> list[int]:
    """Token ids from an int, an array or tensor of integers of any framework, or a flat collection of them.

    Raises DtypeError for what is no integer (strings, 1.5, True), ShapeError for nested lists and ArgumentError for ids
    outside the vocabulary.
    """
    if isinstance(given, (str, bytes)):
        raise DtypeError(f"{name} is {given!r}; token ids are needed: a tokenizer makes them of text")
    given = given.tolist() if hasattr(given, "tolist") else given  # numpy, jax and torch alike
    listed: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    found = []
    for each in listed:
        each = each.tolist() if hasattr(each, "tolist") else each
        if isinstance(each, (list, tuple)):
            raise ShapeError(f"{name} is nested: it holds {_short(each)} where one token id is needed; give a flat list")
        token = _index("", f"a token id of {name}", each)
        if not 0 <= token < vocabulary:
            raise ArgumentError(f"{name} holds token {token}, outside the vocabulary of {vocabulary}")
        found.append(token)
    return found


def positive(name: str, given: Any, least: int = 1) -> int:
    """A number of something as an int of at least `least`."""
    if (number := _index("", name, given)) < least:
        raise ArgumentError(f"{name} = {number} where at least {least} is needed")
    return number


def _check_shapes(where: str, tokens: Any, lengths: Any) -> None:
    _integers(where, "tokens", tokens, 2, "[B, S]")
    _integers(where, "lengths", lengths, 1, "[B]")
    batch, size = tokens.shape
    if batch < 1 or size < 1:
        raise ShapeError(f"{where}: tokens has shape {tokens.shape}; at least one row of at least one token is needed")
    if lengths.shape != (batch,):
        raise ShapeError(f"{where}: lengths has shape {lengths.shape} and tokens {batch} rows; one a row is needed")


def _check_values(where: str, model: Any, tokens: Any, lengths: Any) -> None:
    size, real = tokens.shape[1], _seen(lengths)
    if real is not None and (wrong := np.flatnonzero((real < 1) | (real > size))).size:
        row = wrong[0]
        raise ArgumentError(f"{where}: lengths[{row}] is {real[row]}; between 1 and {size} are real in a row")
    ids = _seen(tokens)
    if ids is not None and real is not None:
        _in_vocabulary(where, model, ids, np.arange(size) < real[:, None])


def _known(tokens: jax.Array, vocabulary: int) -> jax.Array:
    return (tokens >= 0) & (tokens < vocabulary)


def _index(where: str, name: str, given: Any) -> int:
    """An integer of any kind as an int; a bool, a float or a string is none."""
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        return operator.index(given)
    except TypeError:
        prefix = f"{where}: " if where else ""
        raise DtypeError(f"{prefix}{name} is {_short(given)}, a {type(given).__name__}; an integer is needed") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _integers(where: str, name: str, given: Any, rank: int, shape: str) -> None:
    """Refuse what is no integer array of so many dimensions."""
    if not hasattr(given, "dtype") or not hasattr(given, "shape"):
        raise DtypeError(f"{where}: {name} is a {type(given).__name__}; an integer array {shape} is needed")
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise DtypeError(f"{where}: {name} is {given.dtype}; integers are needed")
    if len(given.shape) != rank:
        raise ShapeError(f"{where}: {name} has shape {tuple(given.shape)} where {shape} is needed")


def _seen(given: Any) -> np.ndarray | None:
    """The values of an array where this process can read them: not of a traced one, nor of another host's part."""
    if isinstance(given, (Tracer, jax.ShapeDtypeStruct)):
        return None
    if isinstance(given, jax.Array) and not given.is_fully_addressable:
        return None
    return np.asarray(given)


def _in_vocabulary(where: str, model: Any, ids: np.ndarray, real: Any) -> None:
    size = model.config.vocab_size
    wrong = np.argwhere(real & ((ids < 0) | (ids >= size)))
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        raise ArgumentError(f"{where}: tokens[{', '.join(map(str, at))}] is {ids[at]}, outside the vocabulary of {size}")
