"""Launches as JAX sees them: one compiled function per static signature, with derivatives and vmap through array evaluation.

What a call depends on besides its arrays is a `Static`. Functions are kept by it, so that eager calls of one signature are
traced and compiled once; inside another jit they are inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0

from moekit.backends.array import evaluate
from moekit.backends.mosaic import refusal
from moekit.backends.triton_entry import behind
from moekit.compile import tile as t
from moekit.compile.passes.form import out_of_place, written_name
from moekit.compile.plan import Plan, plan
from moekit.compile.schedule import Schedule
from moekit.errors import UnavailableError
from moekit.jax import launch, ttir
from moekit.jax.view import View
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph

MOST_KEPT = 1024


@dataclass(frozen=True)
class Static:
    """A call without its arrays.

    `buffers`: the arrays it takes, by name. `layouts`: where every tensor lies in them. `separate`: InOut tensors whose new
    value goes elsewhere. `given`: outputs for which there is a View to write to. `fresh`: (name, shape, dtype) of the others.
    `door`: by what kernels get into the program (doors.py).
    """

    fusion: Fusion
    binding: Binding
    buffers: tuple[str, ...]
    layouts: tuple[tuple[str, t.Viewed | t.Mailbox], ...]
    separate: frozenset[str]
    given: frozenset[str]
    fresh: tuple[tuple[str, tuple[int, ...], str], ...]
    schedule: Schedule
    door: str = "pallas"

    @property
    def graph(self) -> Graph:
        """The traced graph."""
        return self.fusion.trace(self.binding)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis."""
        return self.graph.sizes(dict(self.binding.sizes))

    def target(self, name: str) -> str:
        """The name of the memory that an output is written to."""
        return written_name(name) if name in self.separate else name

    def plan(self) -> Plan:
        """The kernels; raises ScheduleError for a schedule that is not legal here, UnavailableError for what is not printed."""
        form, layouts = out_of_place(self.graph, self.separate), dict(self.layouts)
        if self.door == "triton":
            layouts = {n: behind(at, self.lengths.get(n, ()), form.tensors[n].dtype if n in form.tensors else "int32")
                       for n, at in layouts.items()}  # fmt: skip
        made = plan(form, self.schedule, layouts, dict(self.binding.sizes), self.door)
        if self.door == "mosaic" and (why := next((why for why in map(refusal, made.programs) if why), None)):
            raise UnavailableError(why)
        return made

    @property
    def lengths(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that is part of an array."""
        form = out_of_place(self.graph, self.separate)
        parts = {n: at for n, at in self.layouts if isinstance(at, t.Viewed)}
        return {n: form.shape(n, self.sizes) if n in form.tensors else at.base for n, at in parts.items()}

    def start(self, planned: Plan) -> tuple[Callable[..., dict], list[str]]:
        """What runs the kernels, as `launch.launch` does, and the buffers that they write."""
        if self.door == "triton":
            lying = dict(self.layouts) | {s.name: t.Viewed.whole(s.name, s.shape(self.sizes)) for s in planned.scratch}
            return partial(ttir.launch, planned, lying, self.lengths), ttir.written(planned, lying)
        return partial(launch.launch, planned, target=self.door), launch.written(planned)


@lru_cache(maxsize=MOST_KEPT)
def launched(static: Static) -> Callable[..., dict]:
    """The function from the arrays of a call to every buffer that its kernels write, by name.

    Raises ScheduleError or UnavailableError.
    """
    sizes, (start, written) = static.sizes, static.start(static.plan())
    fresh = {n: (shape, dtype) for n, shape, dtype in static.fresh}

    def array_form(*arrays: jax.Array) -> dict:
        return _array_form(static, written, arrays)

    @jax.custom_batching.custom_vmap
    def kernels(*arrays: jax.Array) -> dict:
        varying = launch.varies(array_form, arrays)
        return start(dict(zip(static.buffers, arrays, strict=True)), fresh, sizes, varying)

    @kernels.def_vmap
    def _batched(axis_size, in_batched, *arrays):
        out = jax.vmap(array_form, in_axes=[0 if b else None for b in in_batched], axis_size=axis_size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    def run(*arrays: jax.Array) -> dict:
        return kernels(*arrays)

    run.__name__ = static.fusion.name
    ruled = jax.custom_jvp(run)
    ruled.defjvp(lambda arrays, tangents: _moved(ruled(*arrays), array_form, arrays, tangents), symbolic_zeros=True)
    return jax.jit(ruled, inline=True)


def _moved(outs: dict, array_form: Callable[..., dict], arrays: tuple, tangents: tuple) -> tuple[dict, dict]:
    """The buffers that are written, and how they move with those read: linear, so that reverse mode is the transpose.

    Nothing but the arrays is kept for a backward pass: what the derivative needs of array evaluation is computed there.
    """
    moving = [i for i, v in enumerate(tangents) if not isinstance(v, SymbolicZero) and v.dtype != float0]
    floats = [b for b, out in outs.items() if jnp.issubdtype(out.dtype, jnp.floating)]

    @partial(jax.checkpoint, prevent_cse=False)
    def linear(arrays: tuple, along: list) -> dict:
        def form(*some: jax.Array) -> dict:
            every = dict(enumerate(arrays)) | dict(zip(moving, some, strict=True))
            made = array_form(*every.values())
            return {b: made[b] for b in floats}

        return jax.jvp(form, [arrays[i] for i in moving], along)[1]

    still = {b: SymbolicZero(jax.typeof(out).to_tangent_aval()) for b, out in outs.items()}
    return outs, still | linear(arrays, [tangents[i] for i in moving])


def _array_form(static: Static, wanted: list[str], arrays: tuple[jax.Array, ...]) -> dict:
    """What a launch computes, by array evaluation: every buffer that is written, whole."""
    memory = dict(zip(static.buffers, arrays, strict=True))
    layouts = {n: at for n, at in static.layouts if isinstance(at, t.Viewed)}
    graph, sizes = static.graph, static.sizes

    def lying(at: t.Viewed, base: jax.Array, name: str) -> View:
        picked = tuple((axis, memory[place][0]) for axis, place in at.picked)
        return View(base, at.axes, at.starts, at.steps, graph.shape(name, sizes), at.fixed, picked)

    operands = {n: lying(layouts[n], memory[layouts[n].buffer], n).array() for n in static.fusion.tensors}
    written: dict[str, jax.Array] = {}
    for n, x in evaluate(graph, operands, sizes, "jax").items():
        at = layouts[static.target(n)]
        if n in static.given:  # outputs that go to one base are written one after the other
            x = lying(at, written.get(at.buffer, memory[at.buffer]), n).set(x)
        written[at.buffer] = x
    return {b: written.get(b, memory.get(b)) for b in wanted}  # what counts packets stays as it is


@lru_cache(maxsize=MOST_KEPT)
def evaluated(fusion: Fusion, binding: Binding, library: str = "jax") -> Callable[[dict], dict]:
    """The function from operands by name to outputs by name, by array evaluation with `library` (libraries.py)."""
    graph = fusion.trace(binding)
    sizes = graph.sizes(dict(binding.sizes))

    def run(arrays: dict) -> dict:
        return evaluate(graph, arrays, sizes, library)

    run.__name__ = fusion.name
    return jax.jit(run, inline=True)
