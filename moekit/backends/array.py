"""Array evaluation: the Graph computed with numpy, torch or jax.numpy, whole arrays at a time.

It is the fallback, the autodiff path and the unfused baseline. A node's array has one dimension per axis, in the graph's
order. Declared roundings stay: in JAX a narrowing cast whose result is used again goes through `lax.reduce_precision`, because
XLA drops plain convert pairs on GPU; float32 contractions are never TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from moekit.compile import interpret
from moekit.errors import ShapeError
from moekit.lang.dtypes import is_float, numpy_dtype
from moekit.lang.graph import Along, By, Graph, Node, Write


@dataclass(frozen=True)
class Library:
    """What array evaluation asks of an array library."""

    unary: Mapping[str, Callable]
    binary: Mapping[str, Callable]
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


class _Evaluation:
    """One evaluation: arrays by node."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Any], sizes: Mapping[str, int], lib: Library):
        self.graph, self.arrays, self.lib = graph, arrays, lib
        self.sizes = {a: sizes[a] if s is None else s for a, s in graph.axes.items()}
        self.like = next(iter(arrays.values()))
        self.values: dict[int, Any] = {}
        self.used = {a for i in graph.live() for a in graph.nodes[i].args}

    def run(self) -> dict[str, Any]:
        for i in self.graph.live():
            node = self.graph.nodes[i]
            self.values[i] = OPS[node.op](self, i, node)
        return {w.tensor: self._written(w) for w in self.graph.writes}

    def aligned(self, node: int, axes: tuple[str, ...]):
        """A node's array with a dimension of size 1 for every axis of `axes` it does not have."""
        have = self.graph.nodes[node].axes
        return self.values[node][tuple(slice(None) if a in have else None for a in axes)] if have != axes else self.values[node]

    def _written(self, w: Write):
        dims = self.graph.tensors[w.tensor].dims
        if w.ids:
            return self._put(w, dims)
        axes = self.graph.ordered(d.axis for d in dims)
        full = self.lib.expand(self.aligned(w.value, axes), tuple(self.sizes[a] for a in axes))
        return self.lib.transpose(full, tuple(axes.index(d.axis) for d in dims))

    def _put(self, w: Write, dims):
        along = [i.axis for i in w.index if isinstance(i, Along)]
        axes = self.graph.ordered({*along, *self.graph.nodes[w.ids[0]].axes})
        index = tuple(self._index(e, d.axis, w.ids, axes) for e, d in zip(w.index, dims, strict=True))
        shape = tuple(self.sizes[a] for a in axes)
        value = self.lib.expand(self.aligned(w.value, axes), shape)
        base = self.arrays[w.tensor]
        return self.lib.scatter(base, tuple(self.lib.expand(i, shape) for i in index), value)

    def _index(self, entry, axis: str, args: tuple[int, ...], axes: tuple[str, ...]):
        """An index array over `axes` for one dimension of a tensor."""
        if isinstance(entry, By):
            return self.aligned(args[entry.operand], axes)
        if entry.axis is None:
            return self.lib.constant(entry.start, "int32", self.like)
        index = self.iota(entry)
        return index[tuple(slice(None) if a == entry.axis else None for a in axes)]

    def iota(self, entry: Along):
        return self.lib.arange(self.sizes[str(entry.axis)], self.like) * entry.step + entry.start


def _read(e: _Evaluation, _: int, n: Node):
    tensor, index = e.graph.tensors[n.attr("tensor")], n.attr("index")
    array, axes = e.arrays[tensor.name], [i.axis for i in index if isinstance(i, Along) and i.axis]
    if any(isinstance(i, By) for i in index) or len(set(axes)) < len(axes):
        shape = tuple(e.sizes[a] for a in n.axes)
        at = [e.lib.expand(e._index(i, d.axis, n.args, n.axes), shape) for i, d in zip(index, tensor.dims, strict=True)]
        return e.lib.take(array, tuple(at), e.lib)
    part = tuple(i.start if i.axis is None else slice(i.start, i.start + i.step * (e.sizes[i.axis] - 1) + 1, i.step)
                 if e.sizes[i.axis] else slice(0, 0) for i in index)  # fmt: skip
    return e.lib.transpose(array[part], tuple(axes.index(a) for a in n.axes))


def _elementwise(table: str):
    def evaluate(e: _Evaluation, _: int, n: Node):
        return getattr(e.lib, table)[n.op](*(e.aligned(a, n.axes) for a in n.args))

    return evaluate


def _where(e: _Evaluation, _: int, n: Node):
    return e.lib.where(*(e.aligned(a, n.axes) for a in n.args))


def _reduce(e: _Evaluation, _: int, n: Node):
    if n.attr("kind") != "sum" and e.sizes[n.attr("axis")] == 0:
        axis, kind = n.attr("axis"), n.attr("kind")
        raise ShapeError(f"{e.graph.name}: {kind} over {axis} needs at least one element, got {axis} = 0")
    return e.lib.reduce[n.attr("kind")](e.values[n.args[0]], e.graph.nodes[n.args[0]].axes.index(n.attr("axis")))


def _contract(e: _Evaluation, _: int, n: Node):
    names = {a: chr(97 + i) for i, a in enumerate(e.graph.axes)}
    left, right = ("".join(names[a] for a in e.graph.nodes[x].axes) for x in n.args)
    out = "".join(names[a] for a in n.axes)
    return e.lib.einsum(f"{left},{right}->{out}", *(e.values[a] for a in n.args))


def _cast(e: _Evaluation, i: int, n: Node):
    return e.lib.cast(e.values[n.args[0]], n.dtype, i in e.used)


def _top_k(e: _Evaluation, _: int, n: Node):
    have, axis = e.graph.nodes[n.args[0]].axes, n.attr("axis")
    last = tuple(a for a in have if a != axis)
    keys = e.lib.transpose(e.values[n.args[0]], tuple(have.index(a) for a in (*last, axis)))
    best, ids = e.lib.top_k(keys, n.attr("k"))
    made = (*last, n.attr("into"))
    return e.lib.transpose(best if n.attr("part") == "keys" else ids, tuple(made.index(a) for a in n.axes))


def _pick(e: _Evaluation, _: int, n: Node):
    """The elements of x at ids: differentiable, where the value unpacked from the key is not."""
    _, x, ids = n.args
    have, axis = e.graph.nodes[x].axes, n.attr("axis")
    index = []
    shape = tuple(e.sizes[a] for a in n.axes)
    for a in have:
        at = e.values[ids] if a == axis else e.iota(Along(a))[tuple(slice(None) if b == a else None for b in n.axes)]
        index.append(e.lib.expand(at, shape))
    return e.lib.take(e.values[x], tuple(index), e.lib)


OPS: dict[str, Callable[[_Evaluation, int, Node], Any]] = {
    "read": _read,
    "where": _where,
    "reduce": _reduce,
    "contract": _contract,
    "cast": _cast,
    "top_k": _top_k,
    "pick": _pick,
    "bitcast": lambda e, i, n: e.lib.bitcast(e.values[n.args[0]], n.dtype),
    "iota": lambda e, i, n: e.iota(n.attr("index")),
    "const": lambda e, i, n: e.lib.constant(n.attr("value"), n.dtype, e.like),
    "extent": lambda e, i, n: e.lib.constant(e.sizes[n.attr("axis")], "int32", e.like),
    "cumsum": lambda e, i, n: e.lib.cumsum(e.values[n.args[0]], e.graph.nodes[n.args[0]].axes.index(n.attr("axis"))),
    **{op: _elementwise("unary") for op in (*interpret.UNARY, "softplus")},
    **{op: _elementwise("binary") for op in interpret.BINARY},
}


def evaluate(graph: Graph, arrays: Mapping[str, Any], sizes: Mapping[str, int], library: str) -> dict[str, Any]:
    """The outputs of `graph` by name, computed with `library` ("numpy", "torch" or "jax"); nothing is written in place.

    `arrays` are the operands by name, of any strides; `sizes` gives the dynamic axes.
    """
    with np.errstate(all="ignore"):
        return _Evaluation(graph, arrays, sizes, LIBRARIES[library]()).run()


def _in_range(index, shape) -> Any:
    ok: Any = True
    for i, size in zip(index, shape, strict=True):
        ok = ok & (i >= 0) & (i < size)
    return ok


@lru_cache(maxsize=1)
def numpy_library() -> Library:
    """numpy."""

    def top_k(keys, k):
        ids = np.argsort(-keys.astype(np.int64), axis=-1, kind="stable")[..., :k]
        return np.take_along_axis(keys, ids, -1), ids.astype(np.int32)

    def take(array, index, lib):
        ok = _in_range(index, array.shape)
        if 0 in array.shape:
            return np.zeros(np.shape(ok), array.dtype)
        return np.where(ok, array[tuple(np.where(ok, i, 0) for i in index)], np.zeros((), array.dtype))

    def scatter(base, index, value):
        ok, out = _in_range(index, base.shape), base.copy()
        out[tuple(i[ok] for i in index)] = value[ok]
        return out

    return Library(
        unary={**interpret.UNARY, "softplus": lambda x: np.logaddexp(np.float32(0), x)},
        binary=interpret.BINARY,
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
        take=take,
        scatter=scatter,
    )


@lru_cache(maxsize=1)
def torch_library() -> Library:
    """PyTorch; every operation is differentiable where its maths is."""
    import torch
    from torch._C._functorch import peek_interpreter_stack

    dtypes = {
        name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool")
    }

    def top_k(keys, k):
        best, ids = torch.sort(keys, dim=-1, descending=True, stable=True)
        return best[..., :k], ids[..., :k].to(torch.int32)

    class Bitcast(torch.autograd.Function):
        """`x.view(dtype)` for dtypes of one width, with the rule for vmap that torch has not."""

        forward = staticmethod(lambda x, dtype: x.view(dtype))
        setup_context = staticmethod(lambda ctx, inputs, output: ctx.mark_non_differentiable(output))
        backward = staticmethod(lambda ctx, *grads: (None, None))

        @staticmethod
        def vmap(info, in_dims, *args):
            return Bitcast.apply(*args), in_dims[0]

    def bitcast(x, dtype):
        under_vmap = peek_interpreter_stack() is not None
        return Bitcast.apply(x, dtype) if under_vmap else x.view(dtype)

    def take(array, index, lib):
        ok = _in_range(index, array.shape)
        if 0 in array.shape:
            return torch.zeros(tuple(index[0].shape), dtype=array.dtype, device=array.device)
        picked = array[tuple(torch.where(ok, i, 0).long() for i in index)]
        return torch.where(ok, picked, torch.zeros((), dtype=array.dtype, device=array.device))

    def scatter(base, index, value):
        ok = _in_range(index, base.shape)
        return base.clone().index_put(tuple(i[ok].long() for i in index), value[ok])

    def rounded(v, dtype):
        """What overflows is infinite, as everywhere else."""
        with np.errstate(over="ignore"):
            return float(np.float32(v)) if is_float(dtype) else v

    def einsum(eq, a, b):
        """The product in IEEE float32, whatever the caller allows torch: TF32 on a GPU, bfloat16 on a CPU."""
        a, b = a.float(), b.float()
        backend = torch.backends.cuda.matmul if a.is_cuda else torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
        allowed = backend.fp32_precision
        if allowed in ("ieee", "none"):
            return torch.einsum(eq, a, b)
        backend.fp32_precision = "ieee"
        try:
            return torch.einsum(eq, a, b)
        finally:
            backend.fp32_precision = allowed

    def div(a, b):
        return torch.where(b == 0, 0, torch.div(a, torch.where(b == 0, 1, b), rounding_mode="trunc"))

    names = {"sub": "subtract", "mul": "mul", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
             "shl": "bitwise_left_shift", "shr": "bitwise_right_shift", "div": "true_divide"}  # fmt: skip
    binary = {op: getattr(torch, names.get(op, op)) for op in interpret.BINARY if op not in ("floordiv", "rem")}
    unary_names = {"not": "bitwise_not"}
    return Library(
        unary={
            **{op: getattr(torch, unary_names.get(op, op)) for op in interpret.UNARY},
            "softplus": lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device)),
        },
        binary={**binary, "floordiv": div, "rem": lambda a, b: a - div(a, b) * b},
        reduce={
            "sum": lambda x, axis: torch.sum(x, axis, dtype=x.dtype),
            "max": lambda x, axis: torch.amax(x, axis),
            "min": lambda x, axis: torch.amin(x, axis),
        },
        where=torch.where,
        cast=lambda x, dtype, inner: x.to(dtypes[dtype]),
        bitcast=lambda x, dtype: bitcast(x, dtypes[dtype]),
        arange=lambda n, like: torch.arange(n, dtype=torch.int32, device=like.device),
        constant=lambda v, dtype, like: torch.full((), rounded(v, dtype), dtype=dtypes[dtype], device=like.device),
        cumsum=lambda x, axis: torch.cumsum(x, axis, dtype=x.dtype),
        einsum=einsum,
        top_k=top_k,
        transpose=lambda x, order: x.permute(order),
        expand=lambda x, shape: x.expand(shape),
        take=take,
        scatter=scatter,
    )


@lru_cache(maxsize=1)
def jax_library() -> Library:
    """jax.numpy."""
    import jax.numpy as jnp
    from jax import lax, nn

    def cast(x, dtype, inner):
        if inner and dtype in ("bfloat16", "float16") and x.dtype == jnp.float32:
            exponent, mantissa = (8, 7) if dtype == "bfloat16" else (5, 10)
            x = lax.reduce_precision(x, exponent_bits=exponent, mantissa_bits=mantissa)
        return x.astype(dtype)

    def take(array, index, lib):
        ok = _in_range(index, array.shape)
        if 0 in array.shape:
            return jnp.zeros(jnp.shape(ok), array.dtype)
        return jnp.where(ok, array[tuple(jnp.where(ok, i, 0) for i in index)], jnp.zeros((), array.dtype))

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
        # XLA on CPU lacks some products of narrow floats with a float32 result
        return lax.platform_dependent(a, b, cpu=lambda a, b: product(*(x.astype(jnp.float32) for x in (a, b))), default=product)

    names = {"sub": "subtract", "mul": "multiply", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
             "shl": "left_shift", "shr": "right_shift", "div": "divide", "eq": "equal", "ne": "not_equal", "lt": "less",
             "le": "less_equal", "gt": "greater", "ge": "greater_equal"}  # fmt: skip
    binary = {op: getattr(jnp, names.get(op, op)) for op in interpret.BINARY if op not in ("floordiv", "rem")}
    unary_names = {"neg": "negative", "not": "invert"}
    unary = {op: getattr(jnp, unary_names.get(op, op)) for op in interpret.UNARY if op not in ("rsqrt", "sigmoid")}
    div = safe(lax.div)

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
        unary={**unary, "rsqrt": lax.rsqrt, "sigmoid": nn.sigmoid, "softplus": nn.softplus},
        binary={**binary, "floordiv": div, "rem": whole(lambda a, b: a - div(a, b) * b)},
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
        take=take,
        scatter=scatter,
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": numpy_library,
    "torch": torch_library,
    "jax": jax_library,
}
