"""Mosaic GPU kernels as JAX calls them: compiled from emitted source, `plgpu.kernel` on a GPU, interpret mode elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import mlir

from moekit.backends import mosaic, pallas
from moekit.backends.loaded import load
from moekit.compile import tile as t
from moekit.jax import launch
from moekit.jax.launch import NOWHERE

SCRATCH = 8192  # bytes in which warps add up: four float32 for each thread


@lru_cache(maxsize=1024)
def kernel(program: t.TileProgram, interpret: bool):
    """The kernel function of a program, compiled from its emitted source; in interpret mode helpers know no threads."""
    names = load("mosaic", program.name, mosaic.emit(program), program.digest)
    names |= INTERPRETED if interpret else {}
    return names[mosaic.kernel_name(program)]


def call(
    program: t.Kernel, memory: Mapping[str, jax.Array], wrote: Sequence[str], shapes: Sequence, grid: int, interpret: bool
) -> Sequence[jax.Array]:
    """The arrays that a kernel writes, `wrote`, of these shapes."""
    read, _ = mosaic.buffers(program)
    if interpret:
        return _interpreted(kernel(program, True), program, read, wrote, memory, shapes, grid)
    outs = tuple((x.shape, x.dtype, x.manual_axis_type) for x in shapes)
    return mosaic_call.bind(*(memory[b] for b in read), program=program, wrote=tuple(wrote), outs=outs, count=grid)


# One launch: `count` programs of a kernel, which takes the arrays that it reads. JAX mixes in Mosaic GPU's kernels what varies
# over manual axes of a `shard_map` with what does not, so inside of this no value says that it varies, and its outputs do.
mosaic_call = launch.primitive("mosaic_call")


@partial(mlir.register_lowering, mosaic_call, platform="cuda")
def _lower(ctx, *operands, program, wrote, outs, count):
    plain = [a.update(manual_axis_type=NOWHERE) for a in ctx.avals_in]
    run = partial(_run, program, wrote, [(shape, dtype) for shape, dtype, _ in outs], count)
    return mlir.lower_fun(run)(ctx.replace(avals_in=plain), *operands)


def _run(program: t.Kernel, wrote: Sequence[str], shapes: Sequence, count: int, *arrays: jax.Array) -> list[jax.Array]:
    read, _ = mosaic.buffers(program)
    memory = dict(zip(read, arrays, strict=True))
    places = {b: memory[b] if b in memory else lax.empty(*x) for b, x in zip(wrote, shapes, strict=True)}
    start = partial(_start, kernel(program, False), program.name, read, wrote, memory, count)
    made = pl.run_state(start)(places)
    return [made[b] for b in wrote]


def _start(run, name: str, read, wrote, memory, grid: int, places: dict) -> None:
    """Launch a kernel on references to what it writes, in place."""

    def body(*refs):
        run(*refs)

    body.__name__ = name
    order = (*read, *(b for b in wrote if b not in read))
    params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=SCRATCH)
    launch = plgpu.kernel(body, grid=(grid,), grid_names=("program",), compiler_params=params)
    launch(*(places[b] if b in places else memory[b] for b in order))


def _interpreted(run, program: t.Kernel, read, wrote, memory, shapes, grid: int) -> Sequence[jax.Array]:
    """The same text by JAX's interpret mode, where a reference that is read and written is the output's."""

    def body(*refs):
        places = dict(zip(read, refs, strict=False)) | dict(zip(wrote, refs[len(read) :], strict=True))
        run(*places.values())

    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        grid=(grid,),
        in_specs=[whole] * len(read),
        out_specs=[whole] * len(wrote),
        out_shape=list(shapes),
        input_output_aliases={read.index(b): wrote.index(b) for b in wrote if b in read},
        interpret=True,
        name=program.name,
    )(*(memory[b] for b in read))


def _load(ref, index, layout=None, mask=None, other=0, width=1):
    if mask is None:
        return launch.plt.load(ref.at[_alike(index)])
    index, mask = _alike((*index, mask))[:-1], _alike((*index, mask))[-1]
    return launch.plt.load(ref.at[index], mask=mask, other=other)


def _store(ref, index, value, layout=None, mask=None, width=1):
    index = _alike((*index, *(() if mask is None else (mask,))))
    if mask is None:
        launch.plt.store(ref.at[index], value)
    else:
        launch.plt.store(ref.at[index[:-1]], value, mask=index[-1])


def _mma(left, right, acc, along, layouts, warps):
    summed = (along[:1], along[1:]), ((), ())
    return acc + lax.dot_general(left, right, summed, precision="highest", preferred_element_type=jnp.float32)


def _alike(index: tuple) -> tuple:
    zero = jnp.zeros((), jnp.int32)  # traced: JAX 0.11 refuses a literal beside a mask
    blocks = [x + zero if jnp.result_type(x) != jnp.bool_ else x for x in index]
    return tuple(jnp.broadcast_arrays(*blocks))


_pallas: dict = {"jnp": jnp, "lax": lax}
for _name in ("nan_max", "nan_min"):
    exec(pallas.HELPERS[_name], _pallas)

INTERPRETED = {
    "program": lambda: pl.program_id(0),
    "lanes": lambda n, layout: jnp.arange(n, dtype=jnp.int32),
    "load": _load,
    "store": _store,
    "barrier": lambda: None,
    "spread_to": lambda layout, x, shape, *dims: lax.broadcast_in_dim(x, shape, dims),
    "laid": lambda x, layout: x,
    "mma": _mma,
    "asked": _load,
    "mma_staged": _mma,
    "nan_max": _pallas["nan_max"],
    "nan_min": _pallas["nan_min"],
}
