"""A Plan on JAX arrays: kernels compiled from emitted source and called through `pallas_call`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec, get_abstract_mesh

from moekit.backends import pallas
from moekit.backends.loaded import load
from moekit.compile import tile as t
from moekit.compile.plan import Plan
from moekit.errors import UnavailableError

NOWHERE = ManualAxisType()


def _lowering() -> Any:
    """Pallas's Triton lowering; None of a jax that has dropped it (doors.py)."""
    try:
        return import_module("jax.experimental.pallas.triton")
    except ImportError:
        return None


plt = _lowering()
# What interprets Pallas imports this in the middle of the first lowering; it adds to the context that jit's caches hang on, and
# whatever had been called before was compiled again.
with contextlib.suppress(ImportError):
    import_module("jax.experimental.pallas.fuser")


@lru_cache(maxsize=1024)
def kernel(program: t.Kernel, interpret: bool):
    """The kernel function of a program, compiled from its emitted source; interpret mode has no barrier."""
    names = load("pallas", program.name, pallas.emit(program), program.digest)
    names |= {"barrier": lambda: None, "ways": partial(_unreachable, program.name)} if interpret else {}
    return names[pallas.kernel_name(program)]


def _unreachable(name: str, *_):
    raise UnavailableError(f"{name}: in interpret mode no rank reaches another's memory; choose xla or psum")


def launch(
    plan: Plan,
    bases: Mapping[str, jax.Array],
    shapes: Mapping[str, tuple],
    sizes: Mapping[str, int],
    varying,
    target: str = "pallas",
) -> dict:
    """Run a plan on the buffers of its operands; returns every buffer it writes.

    `bases` maps buffer names to arrays, `shapes` gives (shape, dtype) of the fresh outputs, `varying` is what `varies` says of
    them all. On a CUDA device the kernels are compiled by Pallas's Triton lowering, or by Mosaic GPU where that is `target`;
    elsewhere they run in interpret mode: decided when the program is lowered.
    """
    arrays = {n: spread(a, varying.get(n, NOWHERE)) for n, a in bases.items()}
    kinds = {n: (a.shape, a.dtype) for n, a in bases.items()} | dict(shapes)
    outs = tuple((*kinds[b], varying.get(b, NOWHERE)) for b in written(plan))
    run = partial(_run, plan, target, tuple(arrays), kinds, dict(sizes))
    by_jax = partial(interpreted.bind, run=partial(run, {}, True), outs=outs)
    results = lax.platform_dependent(*arrays.values(), cuda=partial(run, varying, False), default=by_jax)
    return dict(zip(written(plan), results, strict=True))


def varies(array_form: Callable[..., dict], arrays: Sequence[jax.Array]) -> dict[str, ManualAxisType]:
    """Over which manual axes of a `shard_map` each output varies, as array evaluation has it; empty where no operand does."""
    if not any(jax.typeof(a).manual_axis_type.varying for a in arrays):
        return {}
    return {b: out.manual_axis_type for b, out in jax.eval_shape(array_form, *arrays).items()}


def spread(array: jax.Array, wanted: ManualAxisType) -> jax.Array:
    """An array that varies over as many manual axes as is wanted, at least."""
    more = wanted.varying - jax.typeof(array).manual_axis_type.varying
    return lax.pcast(array, tuple(more), to="varying") if more else array


def primitive(name: str) -> Primitive:
    """An operation of JAX that is compiled even where jit is disabled; `outs` is what it returns, as `shaped` takes it."""
    made = Primitive(name)
    made.multiple_results = True

    @made.def_impl
    def eagerly(*arrays, **how):
        with jax.disable_jit(False):
            return jax.jit(partial(made.bind, **how))(*arrays)

    made.def_abstract_eval(lambda *avals, outs, **how: shaped(outs))
    return made


def shaped(outs: Sequence[tuple]) -> list[ShapedArray]:
    """Whole arrays of these shapes and dtypes, and what they vary over."""
    whole = NamedSharding(get_abstract_mesh(), PartitionSpec())
    return [ShapedArray(shape, dtype, sharding=whole, manual_axis_type=varying) for shape, dtype, varying in outs]


# A run in interpret mode. JAX's interpreter mixes what varies over the manual axes of a `shard_map` with what does not, which
# `check_vma` refuses; so inside of it no value says that it varies, and its outputs do.
interpreted = primitive("interpreted")


@partial(mlir.register_lowering, interpreted)
def _lower(ctx, *operands, run, outs):
    plain = [a.update(manual_axis_type=NOWHERE) for a in ctx.avals_in]
    return mlir.lower_fun(run)(ctx.replace(avals_in=plain), *operands)


def written(plan: Plan) -> list[str]:
    """The buffers that the kernels of a plan write, scratch left out."""
    scratch = {s.name for s in plan.scratch}
    return [b for b in dict.fromkeys(b for p in plan.programs for b in pallas.buffers(p)[1]) if b not in scratch]


def _run(
    plan: Plan, target: str, names: tuple, kinds: dict, sizes: dict, varying: dict, interpret: bool, *arrays: jax.Array
) -> list:
    memory = dict(zip(names, arrays, strict=True))
    kinds = kinds | {s.name: (s.shape(sizes), s.dtype) for s in plan.scratch}
    anywhere = ManualAxisType(varying=frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays)))
    for program in plan.programs:
        read, wrote = pallas.buffers(program)
        shapes = [jax.ShapeDtypeStruct(*kinds[b], manual_axis_type=varying.get(b, anywhere)) for b in wrote]
        if target == "mosaic":
            from moekit.jax import mosaic  # half a second to import, which no other call is to wait for

            outs = mosaic.call(program, memory, wrote, shapes, program.programs(sizes), interpret)
            memory |= dict(zip(wrote, outs, strict=True))
            continue
        whole = pl.BlockSpec(memory_space=pl.ANY)
        outs = pl.pallas_call(
            kernel(program, interpret),
            grid=(program.programs(sizes),),
            in_specs=[whole] * len(read),
            out_specs=[whole] * len(wrote),
            out_shape=shapes,
            input_output_aliases={read.index(b): wrote.index(b) for b in wrote if b in read},
            compiler_params=plt.CompilerParams(num_warps=program.warps, num_stages=program.stages),
            interpret=interpret,
            name=program.name,
        )(*(memory[b] for b in read))
        memory |= dict(zip(wrote, outs, strict=True))
    return [memory[b] for b in written(plan)]


def empty(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """An output without elements."""
    return jnp.zeros(shape, dtype)
