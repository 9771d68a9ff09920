"""What array evaluation has of numpy, torch and jax.numpy: a function of each for every operation, with moekit's meaning.

Declared roundings stay: in JAX a narrowing cast whose result is used again is `rounding.rounded` before, because XLA drops
plain convert pairs on GPU; float32 contractions are never TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from moekit.backends.ranks import jax_parts, jax_sum, numpy_parts, torch_parts
from moekit.compile.tile import interpret
from moekit.errors import UnavailableError
from moekit.lang.dtypes import ALL, STORED, is_float, numpy_dtype
from moekit.lang.elementwise import ELEMENTWISE

NO_DERIVATIVE = "what is rounded to float8 has no derivative; detach its operands, or use a fusion that rounds nothing to it"
#: What the libraries call operations that they do not call as moekit does.
TORCH = {
    "sub": "subtract", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "bitwise_not",
    "shl": "bitwise_left_shift", "shr": "bitwise_right_shift", "div": "true_divide",
}  # fmt: skip
JAX = {
    "sub": "subtract", "mul": "multiply", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "neg": "negative",
    "not": "invert", "shl": "left_shift", "shr": "right_shift", "div": "divide", "eq": "equal", "ne": "not_equal",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip


@dataclass(frozen=True)
class Library:
    """What array evaluation asks of an array library."""

    elementwise: Mapping[str, Callable]
    reduce: Mapping[str, Callable]
    where: Callable
    cast: Callable
    bitcast: Callable
    arange: Callable
    constant: Callable
    cumsum: Callable
    einsum: Callable
    top_k: Callable
    transpose: Callable
    expand: Callable
    take: Callable
    scatter: Callable
    parts: Callable  # of all ranks of a mesh axis (ranks.py)


def _in_range(index, shape) -> Any:
    ok: Any = True
    for i, size in zip(index, shape, strict=True):
        ok = ok & (i >= 0) & (i < size)
    return ok


def _take(xp) -> Callable:
    """Elements at indices, 0 where one is out of range: of numpy, or of what has its names."""

    def take(array, index):
        ok = _in_range(index, array.shape)
        if 0 in array.shape:
            return xp.zeros(xp.shape(ok), array.dtype)
        return xp.where(ok, array[tuple(xp.where(ok, i, 0) for i in index)], xp.zeros((), array.dtype))

    return take


@lru_cache(maxsize=1)
def numpy_library() -> Library:
    """numpy."""

    def top_k(keys, k):
        ids = np.argsort(-keys.astype(np.int64), axis=-1, kind="stable")[..., :k]
        return np.take_along_axis(keys, ids, -1), ids.astype(np.int32)

    def scatter(base, index, value):
        ok, out = _in_range(index, base.shape), base.copy()
        out[tuple(i[ok] for i in index)] = value[ok]
        return out

    return Library(
        elementwise={op: row.meaning for op, row in ELEMENTWISE.items()},
        reduce={k: (lambda x, axis, f=f: f(x, axis=axis, dtype=x.dtype)) for k, f in interpret.REDUCE.items()},
        where=np.where,
        cast=lambda x, dtype, inner: x.astype(numpy_dtype(dtype)),
        bitcast=lambda x, dtype: np.ascontiguousarray(x).view(numpy_dtype(dtype)),
        arange=lambda n, like: np.arange(n, dtype=np.int32),
        constant=lambda v, dtype, like: np.asarray(v, numpy_dtype(dtype)),
        cumsum=lambda x, axis: np.cumsum(x, axis=axis, dtype=x.dtype),
        einsum=lambda eq, a, b: np.einsum(eq, a.astype(np.float32), b.astype(np.float32)),
        top_k=top_k,
        transpose=np.transpose,
        expand=np.broadcast_to,
        take=_take(np),
        scatter=scatter,
        parts=numpy_parts,
    )


@lru_cache(maxsize=1)
def torch_library() -> Library:
    """PyTorch; every operation is differentiable where its maths is."""
    import torch
    from torch._C._functorch import peek_interpreter_stack

    from moekit.backends.torch_product import product

    dtypes = {name: getattr(torch, name) for name in ALL}

    def top_k(keys, k):
        best, ids = torch.sort(keys, dim=-1, descending=True, stable=True)
        return best[..., :k], ids[..., :k].to(torch.int32)

    class Bitcast(torch.autograd.Function):
        """`x.view(dtype)` for dtypes of one width, with the rule for vmap that torch has not; bits have no derivative."""

        forward = staticmethod(lambda x, dtype: x.view(dtype))
        setup_context = staticmethod(lambda ctx, inputs, output: ctx.mark_non_differentiable(output))
        backward = staticmethod(lambda ctx, *grads: (None, None))
        jvp = staticmethod(lambda ctx, *tangents: None)

        @staticmethod
        def vmap(info, in_dims, *args):
            return Bitcast.apply(*args), in_dims[0]

    class Narrowed(torch.autograd.Function):
        """`x.to(dtype)` for a dtype that nothing is computed in, gradients neither."""

        forward = staticmethod(lambda x, dtype: x.to(dtype))
        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(lambda ctx, *grads: refuse())
        jvp = staticmethod(lambda ctx, *tangents: refuse())

        @staticmethod
        def vmap(info, in_dims, *args):
            return Narrowed.apply(*args), in_dims[0]

    def refuse():
        raise UnavailableError(NO_DERIVATIVE)

    def cast(x, dtype, inner):
        return Narrowed.apply(x, dtypes[dtype]) if dtype in STORED and x.dtype != dtypes[dtype] else x.to(dtypes[dtype])

    def bitcast(x, dtype):
        under_vmap = peek_interpreter_stack() is not None
        return Bitcast.apply(x, dtype) if under_vmap else x.view(dtype)

    def take(array, index):
        ok = _in_range(index, array.shape)
        if 0 in array.shape:
            return torch.zeros(tuple(index[0].shape), dtype=array.dtype, device=array.device)
        picked = array[tuple(torch.where(ok, i, 0).long() for i in index)]
        return torch.where(ok, picked, torch.zeros((), dtype=array.dtype, device=array.device))

    def scatter(base, index, value):
        """What is outside goes behind the rest and is cut off: no shape follows from values, which vmap refuses."""
        ok, place = _in_range(index, base.shape), 0
        for i, size in zip(index, base.shape, strict=True):
            place = place * size + i.long()
        longer = torch.cat((base.reshape(-1), base.new_zeros(1)))
        return longer.index_put((torch.where(ok, place, base.numel()),), value)[:-1].reshape(base.shape)

    def rounded(v, dtype):
        """What overflows is infinite, as everywhere else."""
        with np.errstate(over="ignore"):
            return float(np.float32(v)) if is_float(dtype) else v

    def div(a, b):
        return torch.where(b == 0, 0, torch.div(a, torch.where(b == 0, 1, b), rounding_mode="trunc"))

    own = {
        "floordiv": div,
        "rem": lambda a, b: a - div(a, b) * b,
        "softplus": lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device)),
    }
    return Library(
        elementwise={op: own.get(op) or getattr(torch, TORCH.get(op, op)) for op in ELEMENTWISE},
        reduce={
            "sum": lambda x, axis: torch.sum(x, axis, dtype=x.dtype),
            "max": lambda x, axis: torch.amax(x, axis),
            "min": lambda x, axis: torch.amin(x, axis),
        },
        where=torch.where,
        cast=cast,
        bitcast=lambda x, dtype: bitcast(x, dtypes[dtype]),
        arange=lambda n, like: torch.arange(n, dtype=torch.int32, device=like.device),
        constant=lambda v, dtype, like: torch.full((), rounded(v, dtype), dtype=dtypes[dtype], device=like.device),
        cumsum=lambda x, axis: torch.cumsum(x, axis, dtype=x.dtype),
        einsum=product,
        top_k=top_k,
        transpose=lambda x, order: x.permute(order),
        expand=lambda x, shape: x.expand(shape),
        take=take,
        scatter=scatter,
        parts=torch_parts,
    )


@lru_cache(maxsize=1)
def jax_library() -> Library:
    """jax.numpy."""
    import jax.numpy as jnp
    from jax import lax, nn

    from moekit.backends.rounding import narrowed, rounded

    def cast(x, dtype, inner):
        if dtype in STORED and x.dtype != dtype:
            return narrowed(x, dtype)
        return (rounded(x, dtype) if inner and x.dtype == jnp.float32 else x).astype(dtype)

    def scatter(base, index, value):
        ok = _in_range(index, base.shape)
        outside = tuple(jnp.where(ok, i, size) for i, size in zip(index, base.shape, strict=True))
        return base.at[outside].set(value, mode="drop", unique_indices=True)

    def whole(f):
        return lambda a, b: f(*jnp.broadcast_arrays(a, b))

    def safe(f):
        return whole(lambda a, b: jnp.where(b == 0, f(a, a) * 0, f(a, jnp.where(b == 0, 1, b))))

    def einsum(eq, a, b):
        product = partial(jnp.einsum, eq, precision="highest", preferred_element_type=jnp.float32)
        if a.dtype == b.dtype == jnp.float32:
            return product(a, b)
        if a.dtype in STORED:  # which libraries below XLA have their own ways of adding up
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        # XLA on CPU lacks some products of narrow floats with a float32 result
        return lax.platform_dependent(a, b, cpu=lambda a, b: product(*(x.astype(jnp.float32) for x in (a, b))), default=product)

    div = safe(lax.div)
    own = {"floordiv": div, "rem": whole(lambda a, b: a - div(a, b) * b), "rsqrt": lax.rsqrt}
    own |= {"sigmoid": nn.sigmoid, "softplus": nn.softplus}

    def extreme(reduce):
        """XLA on CPU drops NaN from maxima of long rows (openxla/xla 21461; seen with jax 0.11.2, 300 columns)."""

        def told(x, axis):
            return jnp.where(jnp.isnan(x).any(axis=axis), jnp.asarray(jnp.nan, x.dtype), reduce(x, axis=axis))

        def made(x, axis):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return reduce(x, axis=axis)
            return lax.platform_dependent(x, cpu=lambda x: told(x, axis), default=lambda x: reduce(x, axis=axis))

        return made

    return Library(
        elementwise={op: own.get(op) or getattr(jnp, JAX.get(op, op)) for op in ELEMENTWISE},
        reduce={
            "sum": lambda x, axis: jnp.sum(x, axis=axis, dtype=x.dtype),
            "max": extreme(jnp.max),
            "min": extreme(jnp.min),
        },
        where=jnp.where,
        cast=cast,
        bitcast=lambda x, dtype: lax.bitcast_convert_type(x, dtype),
        arange=lambda n, like: jnp.arange(n, dtype=jnp.int32),
        constant=lambda v, dtype, like: jnp.asarray(v, dtype),
        cumsum=lambda x, axis: jnp.cumsum(x, axis=axis, dtype=x.dtype),
        einsum=einsum,
        top_k=lambda keys, k: tuple(lax.top_k(keys, k)),
        transpose=jnp.transpose,
        expand=jnp.broadcast_to,
        take=_take(jnp),
        scatter=scatter,
        parts=jax_parts,
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": numpy_library,
    "torch": torch_library,
    "jax": jax_library,
    "psum": lambda: replace(jax_library(), parts=jax_sum),
}
