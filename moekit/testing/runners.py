"""Every implementation as a function from one call to its outputs, so that one suite serves them all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile import interpret
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph
from moekit.testing.layouts import (
    INPUT_ONLY,
    Placed,
    as_torch,
    as_view,
    fetch,
    place,
    place_empty,
    tile_layout,
    to_numpy,
)


@dataclass(frozen=True)
class Call:
    """One call: operands by name, static parameters, the layout of each operand and output (contiguous if not
    said).
    """

    fusion: Fusion
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, object] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None

    @functools.cached_property
    def binding(self) -> Binding:
        """The call bound to the declaration."""
        shapes = {n: x.shape for n, x in self.operands.items()}
        dtypes = {n: x.dtype.name for n, x in self.operands.items()}
        return self.fusion.bind(shapes, dtypes, self.fusion.bind_params(self.params))

    @functools.cached_property
    def graph(self) -> Graph:
        """The traced graph."""
        return self.fusion.trace(self.binding)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every axis."""
        return dict(self.binding.sizes) | {a: s for a, s in self.graph.axes.items() if s is not None}

    @property
    def names(self) -> list[str]:
        """The outputs, in the order they are returned."""
        return [w.tensor for w in self.graph.writes]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand or output."""
        if name in self.operands:
            return self.operands[name].shape
        return tuple(self.sizes[d.text] for d in self.graph.tensors[name].dims)

    def layout(self, name: str) -> str:
        """The layout of an operand or output; stride 0 is for operands that are only read."""
        layout = self.layouts.get(name, "contiguous")
        return "contiguous" if layout in INPUT_ONLY and self.graph.tensors[name].role != "In" else layout

    def placed(self) -> Call:
        """The same call with operands as they are once laid out: stride 0 makes many elements one."""
        arrays = {n: place(x, self.layout(n)).array.copy() for n, x in self.operands.items()}
        return replace(self, operands=arrays)


@dataclass(frozen=True)
class Outcome:
    """What a call gave: outputs by name, and what it did that it must not do."""

    outputs: Mapping[str, np.ndarray]
    problems: tuple[str, ...] = ()


Runner = Callable[[Call], Outcome]


def _guarded(call: Call, memory: Mapping[str, Placed], written: set[str]) -> tuple[str, ...]:
    """Writes outside the elements of the tensors in `memory`, and to tensors that are not `written`."""
    problems = []
    for name, placed in memory.items():
        if touched := placed.touched():
            problems.append(f"{call.fusion.name}: {touched} bytes outside {name} ({call.layout(name)}) were written")
        elif name not in written and placed.changed():
            problems.append(f"{call.fusion.name}: {name} was written, but it is an input")
    return tuple(problems)


def _memory(call: Call) -> tuple[dict[str, Placed], dict[str, Placed]]:
    """Operands, and poisoned outputs for those that are no operands, each in its layout."""
    operands = {n: place(x, call.layout(n)) for n, x in call.operands.items()}
    fresh = [n for n in call.names if n not in operands]
    outs = {n: place_empty(call.shape(n), call.graph.tensors[n].dtype, call.layout(n)) for n in fresh}
    return operands, outs


def run_interpret(call: Call) -> Outcome:
    """The tile program, executed by numpy; InOut operands are updated in place."""
    operands, outs = _memory(call)
    memory = operands | outs
    planned = plan(call.graph, call.schedule, {n: tile_layout(p) for n, p in memory.items()})
    interpret.run(planned, {n: p.array for n, p in memory.items()}, call.sizes)
    return Outcome({n: memory[n].array.copy() for n in call.names}, _guarded(call, memory, set(call.names)))


def run_numpy(call: Call) -> Outcome:
    """The graph, evaluated by numpy."""
    from moekit.backends.array import evaluate

    operands, _ = _memory(call)
    outputs = evaluate(call.graph, {n: p.array for n, p in operands.items()}, call.sizes, "numpy")
    return Outcome(outputs, _guarded(call, operands, set()))


def _run_jax(implementation: str, call: Call) -> Outcome:
    """The JAX face: operands and outputs are Views of larger arrays wherever the layout is one that a View
    can say.
    """
    import jax

    from moekit.jax import op

    views = {n: as_view(x, call.layout(n)) for n, x in call.operands.items()}
    outs = {
        n: as_view(interpret.poison(call.shape(n), call.graph.tensors[n].dtype), call.layout(n))
        for n in call.names
        if call.layout(n) != "contiguous" and n not in views
    }

    @jax.jit
    def face(views: tuple, given: dict):
        out = tuple(given.get(n) for n in call.names) if given else None
        options = {"implementation": implementation, "schedule": call.schedule, "out": out}
        return op(call.fusion)(*views, **call.params, **options)

    got = face(tuple(views.values()), outs)
    got = got if len(call.names) > 1 else (got,)
    outputs, problems = {}, []
    for name, x in zip(call.names, got, strict=True):
        if name in outs:
            before, after = np.asarray(outs[name].base), np.asarray(x)
            result = replace(outs[name], base=x)
            x, blank = result.array(), interpret.poison(call.shape(name), after.dtype.name)
            wiped = np.asarray(replace(outs[name], base=result.set(jax.numpy.asarray(blank))).base)
            if before.view(np.uint8).tobytes() != wiped.view(np.uint8).tobytes():
                problems.append(f"{call.fusion.name}: elements outside the view of {name} were written")
        outputs[name] = np.asarray(x)
    return Outcome(outputs, tuple(problems))


def _run_torch(implementation: str, in_place: bool, device: str, call: Call) -> Outcome:
    """The PyTorch face: tensors of exactly the layouts' strides; plain with `out=` buffers, or in place."""
    from moekit.torch import op

    operands, fresh = _memory(call)
    updated = {} if in_place else {n: place_empty(call.shape(n), operands[n].array.dtype.name, call.layout(n))
                                   for n in call.names if n in operands}  # fmt: skip
    outs = fresh | updated
    tensors = {n: as_torch(p, device) for n, p in operands.items()}
    buffers = {n: as_torch(p, device) for n, p in outs.items()}
    given = tuple(buffers.get(n) for n in call.names) if call.layouts else None
    got = op(call.fusion, in_place=in_place)(
        *tensors.values(), **call.params, implementation=implementation, schedule=call.schedule, out=given
    )
    got = dict(zip(call.names, got if isinstance(got, tuple) else (got,), strict=True))
    for n, p in operands.items():
        fetch(p, tensors[n])
    for n, p in outs.items():
        fetch(p, buffers[n])
    problems = _guarded(call, operands, set(call.names) if in_place else set())
    if given:
        problems += _guarded(call, outs, set(call.names))
        unused = [n for n in outs if got[n].data_ptr() != buffers[n].data_ptr() and got[n].numel()]
        problems += tuple(f"{call.fusion.name}: what was returned for {n} is not the buffer given" for n in unused)
    return Outcome({n: to_numpy(x).copy() for n, x in got.items()}, problems)


RUNNERS: dict[str, Runner] = {
    "interpret": run_interpret,
    "numpy": run_numpy,
    "eager": functools.partial(_run_torch, "eager", False, "cpu"),
    "eager in place": functools.partial(_run_torch, "eager", True, "cpu"),
    "xla": functools.partial(_run_jax, "xla"),
    "pallas": functools.partial(_run_jax, "pallas"),
    "triton": functools.partial(_run_torch, "triton", False, "cuda"),
    "triton in place": functools.partial(_run_torch, "triton", True, "cuda"),
}
NEEDS_GPU = frozenset({"triton", "triton in place"})
