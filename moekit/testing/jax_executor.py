"""JAX's implementations: every tensor of a case is a View of the dense array in guarded memory that its layout says it lies in.

One function is compiled for all cases that differ in values alone; outputs come back as whole arrays, gaps included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moekit.backends.mosaic import unprinted
from moekit.jax import View, launch, mosaic, op, program, view
from moekit.jax.face import KERNELS
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor, keep, launches, schedule_of
from moekit.testing.guard import Slot
from moekit.testing.layouts import Layout

PROGRAMS = 64  # how many are kept
CALLED = {"triton-jax": "triton"}  # what the face calls an implementation, where it is not as here


def view_of(base: Any, layout: Layout, shape: tuple[int, ...]) -> View:
    """The tensor of `shape` that `layout` places in `base` (whose axes are in the order of storage).

    It is sliced twice: to every so manieth element first, and of those to the ones that are wanted.
    """
    every, wanted = [], []
    for d in layout.order:
        first, step = divmod(layout.starts[d], layout.steps[d])
        every.append(slice(step, None, layout.steps[d]))
        wanted.append(slice(first, first + shape[d]))
    return view(base)[tuple(every)][tuple(wanted)].transpose(*(layout.order.index(d) for d in range(len(shape))))


def _view(case: FuzzCase, name: str, bases: Mapping[str, Any]) -> View:
    """A tensor of a case, in the arrays of the case; stride 0 has no View, and is the whole of an array."""
    layout, shape = case.layout(name), case.shape(name)
    if not case.woven:
        return view_of(bases[name], Layout.dense(len(shape)) if layout.zero else layout, shape)
    array, turn, _ = case.weave()[name]
    return view(bases[array])[..., turn % 2 :: 2][..., turn // 2]


def _elements(case: FuzzCase, name: str, base: np.ndarray) -> np.ndarray:
    """The elements of a tensor that may be written, in its array."""
    return base[..., case.weave()[name][1]] if case.woven else case.layout(name).elements(base, case.shape(name))


def key(case: FuzzCase) -> str:
    """What a compiled program of the case depends on."""
    parts = (case.declaration.name, sorted(case.extents.items()), sorted(case.dtypes.items()),
             sorted(case.params.items()), case.mode, case.schedule, case.woven,
             [(n, case.shape(n), case.layout(n)) for n in case.memory()])  # fmt: skip
    return repr(parts)


class Jax(Executor):
    """A JAX implementation. Of four cases one is run on other poison too: what costs is the compilation, then the transfers."""

    every = 4

    def __init__(self, name: str):
        super().__init__(name)
        self.functions: dict[tuple, tuple[Callable, int]] = {}

    def supports(self, case: FuzzCase) -> bool:
        """An output over another operand is not to be had without strides, nor are strides past 2³¹; nor all of Mosaic."""
        if case.mode.startswith("over:") or any(case.layout(n).kind == "far" for n in case.memory()):
            return False
        return self.name != "mosaic" or _printed(case)

    def tensor(self, memory: np.ndarray, slot: Slot) -> np.ndarray:
        """The array that the tensor lies in."""
        return slot.whole(memory)

    def call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        """Run the case through a function compiled for it."""
        with widths(case):
            self._call(case, tensors)

    def _call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        bases, text = arrays(case, tensors), (case.declaration, key(case))
        if text not in self.functions:
            if len(self.functions) == PROGRAMS:
                self.functions.clear()
            self.functions[text] = _built(self.name, case, bases)
        function, kernels = self.functions[text]
        for (name, target), x in zip(case.targets.items(), function(bases), strict=True):
            after, mine = np.asarray(x), tensors[target]
            elements = _elements(case, target, mine)
            if case.mode == "plain":
                keep(elements, after, name)[...] = after
            else:
                mine[...] = np.where((mine != mine) & (after != after), mine, after)  # XLA may give a NaN other bits
                elements[...] = _elements(case, target, after)
        launches[self.name] += kernels if self.name in KERNELS else 1


def widths(case: FuzzCase) -> contextlib.AbstractContextManager:
    """Where JAX has the int64 that is among a case's operands: it would narrow numbers past 2³¹, and say nothing."""
    return jax.enable_x64(True) if "int64" in case.dtypes.values() else contextlib.nullcontext()


def arrays(case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays that a call takes, each with a name: woven tensors share one."""
    names = [n for n in case.memory() if n in case.shapes or case.mode != "plain"]
    return {case.weave()[n][0] if case.woven else n: jnp.asarray(tensors[n]) for n in names}


def compiled(implementation: str, case: FuzzCase) -> Callable[[Mapping[str, Any]], tuple]:
    """A jitted function of the arrays of the case's memory, by name; it returns those of the outputs.

    Its kernels are traced anew, so that they are counted, whatever was traced before.
    """
    program.launched.cache_clear()
    face, options = (
        op(case.declaration),
        {"implementation": CALLED.get(implementation, implementation), "schedule": schedule_of(case)},
    )

    @jax.jit
    def run(bases: Mapping[str, Any]) -> tuple:
        given = None if case.mode == "plain" else tuple(_view(case, t, bases) for t in case.targets.values())
        got = face(*(_view(case, n, bases) for n in case.shapes), **case.params, **options, out=given)
        return got if isinstance(got, tuple) else (got,)

    return run


def _built(implementation: str, case: FuzzCase, bases: Mapping[str, jax.Array]) -> tuple[Callable, int]:
    """The compiled function of a case, and how many kernels were built into it."""
    built, pallas, other = [], launch.kernel, mosaic.kernel

    def counted(make, program, interpret):
        built.append(program)
        return make(program, interpret)

    launch.kernel, mosaic.kernel = partial(counted, pallas), partial(counted, other)
    try:
        return compiled(implementation, case).lower(bases).compile(), len(built)
    finally:
        launch.kernel, mosaic.kernel = pallas, other


def _printed(case: FuzzCase) -> bool:
    """Whether the case has Mosaic kernels."""
    fusion = case.declaration
    binding = fusion.bind({n: case.shape(n) for n in case.shapes}, case.dtypes, fusion.bind_params(case.params))
    graph = fusion.trace(binding)
    return unprinted(graph, graph.sizes(dict(binding.sizes)), schedule_of(case)) is None
