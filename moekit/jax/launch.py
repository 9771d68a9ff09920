"""A Plan on JAX arrays: kernels compiled from emitted source and called through `pallas_call`."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moekit.backends import pallas
from moekit.compile import tile as t
from moekit.compile.plan import Plan


@lru_cache(maxsize=1024)
def kernel(program: t.Kernel):
    """The kernel function of a program, compiled from its emitted source."""
    source = pallas.emit(program)
    filename = f"<moekit pallas {program.name} {program.digest} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names: dict = {}
    exec(compile(source, filename, "exec"), names)
    return names[pallas.kernel_name(program)]


def launch(plan: Plan, bases: Mapping[str, jax.Array], shapes: Mapping[str, tuple], sizes: Mapping[str, int]) -> dict:
    """Run a plan on the buffers of its operands; returns every buffer it writes.

    `bases` maps buffer names to arrays, `shapes` gives (shape, dtype) of the fresh outputs. On a CUDA device the kernels are
    compiled by Pallas's Triton lowering, elsewhere they run in interpret mode: decided when the program is lowered.
    """
    names = tuple(bases)
    run = partial(_run, plan, names, dict(shapes), dict(sizes))
    outs = lax.platform_dependent(*bases.values(), cuda=partial(run, False), default=partial(run, True))
    return dict(zip(written(plan), outs, strict=True))


def written(plan: Plan) -> list[str]:
    """The buffers that the kernels of a plan write, scratch left out."""
    scratch = {s.name for s in plan.scratch}
    return [b for b in dict.fromkeys(b for p in plan.programs for b in pallas.buffers(p)[1]) if b not in scratch]


def _run(plan: Plan, names: tuple[str, ...], shapes: dict, sizes: dict, interpret: bool, *arrays: jax.Array) -> tuple:
    memory = dict(zip(names, arrays, strict=True))
    shapes = shapes | {s.name: (s.shape(sizes), s.dtype) for s in plan.scratch}
    for program in plan.programs:
        read, wrote = pallas.buffers(program)
        out_shapes = [jax.ShapeDtypeStruct(memory[b].shape, memory[b].dtype) if b in read
                      else jax.ShapeDtypeStruct(*shapes[b]) for b in wrote]  # fmt: skip
        whole = pl.BlockSpec(memory_space=pl.ANY)
        outs = pl.pallas_call(
            kernel(program),
            grid=(program.programs(sizes),),
            in_specs=[whole] * len(read),
            out_specs=[whole] * len(wrote),
            out_shape=out_shapes,
            input_output_aliases={read.index(b): wrote.index(b) for b in wrote if b in read},
            compiler_params=plt.CompilerParams(num_warps=program.warps, num_stages=program.stages),
            interpret=interpret,
            name=program.name,
        )(*(memory[b] for b in read))
        memory |= dict(zip(wrote, outs, strict=True))
    return tuple(memory[b] for b in written(plan))


def empty(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """An output without elements."""
    return jnp.zeros(shape, dtype)
