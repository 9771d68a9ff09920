"""Running cases through JAX: one compiled shape and layout, many values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moekit.jax import View, launch, op, program, view
from moekit.lang.dtypes import numpy_dtype
from moekit.testing.batch import Verdict
from moekit.testing.case import FuzzCase, Layout
from moekit.testing.executors import Executor, launches, schedule_of
from moekit.testing.guard import POISONS
from moekit.testing.oracle import Oracle


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


def base_of(values: np.ndarray | None, shape: tuple[int, ...], dtype: str, layout: Layout, poison: int) -> np.ndarray:
    """The base array of a tensor: its values, and `poison` in every other byte."""
    extents = layout.base(shape)
    base = np.empty([extents[d] for d in layout.order], numpy_dtype(dtype))
    base.view(np.uint8)[...] = poison
    if values is not None:
        _elements(base, layout, shape)[...] = values
    return base


def _elements(base: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    index = [slice(layout.starts[d], layout.starts[d] + layout.steps[d] * (shape[d] - 1) + 1 if shape[d] else layout.starts[d],
                   layout.steps[d]) for d in layout.order]  # fmt: skip
    return np.transpose(base[tuple(index)], [layout.order.index(d) for d in range(len(shape))])


def _layout(case: FuzzCase, name: str) -> Layout:
    layout = case.layout(name)
    return layout if layout.viewable else Layout.dense(len(layout.order))


def _array(case: FuzzCase, name: str) -> str:
    """The array that a tensor of a case lies in."""
    return case.weave()[name][0] if case.woven else name


def _view(case: FuzzCase, name: str, bases: Mapping[str, Any]) -> View:
    """A tensor of a case, in the arrays of the case."""
    shape, base = case.shape(name), bases[_array(case, name)]
    if not case.woven:
        return view_of(base, _layout(case, name), shape)
    turn = case.weave()[name][1]
    return view(base)[..., turn % 2 :: 2][..., turn // 2]


def _place(case: FuzzCase, name: str, base: np.ndarray) -> np.ndarray:
    """The elements of a tensor in its array."""
    if case.woven:
        return base[..., case.weave()[name][1]]
    return _elements(base, _layout(case, name), case.shape(name))


def _bases(case: FuzzCase, names: Sequence[str], values: Mapping[str, np.ndarray], poison: int) -> dict[str, np.ndarray]:
    """The arrays that hold some tensors of a case: their values, and `poison` in every other byte."""
    bases: dict[str, np.ndarray] = {}
    for n in names:
        if case.woven:
            layout = Layout.dense(len(case.shape(n)) + 1)
            whole = base_of(None, (*case.shape(n), case.weave()[n][2]), case.dtype(n), layout, poison)
        else:
            whole = base_of(None, case.shape(n), case.dtype(n), _layout(case, n), poison)
        base = bases.setdefault(_array(case, n), whole)
        if n in values:
            _place(case, n, base)[...] = values[n]
    return bases


def key(case: FuzzCase) -> str:
    """What a compiled program of the case depends on."""
    parts = (sorted(case.extents.items()), sorted(case.dtypes.items()), sorted(case.params.items()), case.mode, case.schedule,
             [(n, case.shape(n), _layout(case, n)) for n in case.memory()], case.woven)  # fmt: skip
    return f"{case.fusion} {parts}"


def compiled(implementation: str, case: FuzzCase):
    """A jitted function of the base arrays of the case's memory, by name; it returns the outputs' bases.

    Its kernels are traced anew, so that they are counted, whatever was traced before.
    """
    program.launched.cache_clear()
    face, names = op(case.declaration), list(case.shapes)

    @jax.jit
    def run(bases: Mapping[str, Any]) -> tuple:
        views = {n: _view(case, n, bases) for n in (*case.shapes, *case.targets.values()) if _array(case, n) in bases}
        given = None
        if case.mode != "plain":
            given = tuple(views[t] for t in case.targets.values())
        options = {"implementation": implementation, "schedule": schedule_of(case), "out": given}
        got = face(*(views[n] for n in names), **case.params, **options)
        return got if isinstance(got, tuple) else (got,)

    return run


class Jax(Executor):
    """A JAX implementation on tensors in numpy memory: operands become bases of their layouts, results are copied back.

    For properties, which relate two calls; what is written beside a tensor is looked for by `run_values`.
    """

    def supports(self, case: FuzzCase) -> bool:
        """An output over another operand is not to be had without strides."""
        return not case.mode.startswith("over:")

    def call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        """Run the case through a function compiled for it."""
        memory = [n for n in case.memory() if n in case.shapes or case.mode != "plain"]
        bases = _bases(case, memory, {n: tensors[n] for n in case.shapes}, POISONS[0])
        got = _compiled(self.name, key(case), case)({n: jnp.asarray(x) for n, x in bases.items()})
        launches[self.name] += 1
        for target, x in zip(case.targets.values(), got, strict=True):
            after = np.asarray(x)
            plain = case.mode == "plain"
            tensors[target][...] = after if plain else _place(case, target, after)


_functions: dict[tuple[str, str], Callable] = {}


def _compiled(implementation: str, text: str, case: FuzzCase) -> Callable:
    """`compiled`, kept for the calls of one property."""
    if (implementation, text) not in _functions:
        if len(_functions) > 64:
            _functions.clear()
        _functions[implementation, text] = compiled(implementation, case)
    return _functions[implementation, text]


def run_values(implementation: str, pairs: Sequence[tuple[FuzzCase, Oracle]]) -> list[Verdict]:
    """Run cases that differ in values alone, through one compiled function."""
    first = pairs[0][0]
    kernels = _counting()
    before = kernels.count
    function, verdicts = compiled(implementation, first), []
    for i, (case, oracle) in enumerate(pairs):
        verdict = Verdict(case)
        runs = []
        for poison in POISONS if i % 4 == 0 else POISONS[:1]:
            try:
                runs.append(_one(function, case, oracle, poison, verdict))
            except Exception as error:
                if "CUDA_ERROR" in str(error):
                    raise
                verdict.problems.append(f"{type(error).__name__}: {str(error)[:500]}")
                return [*verdicts, verdict, *(Verdict(c) for c, _ in pairs[i + 1 :])]
        verdict.launched = implementation == "xla" or kernels.count > before
        launches[implementation] += len(runs) * verdict.launched
        problems, verdict.ratio = oracle.problems(runs[0])
        verdict.problems += problems
        for n, x in runs[-1].items():
            if x.tobytes() != runs[0][n].tobytes():
                verdict.problems.append(f"{case.fusion}: {n} depends on what lies around the tensors")
        verdicts.append(verdict)
    return verdicts


def _one(function, case: FuzzCase, oracle: Oracle, poison: int, verdict: Verdict) -> dict[str, np.ndarray]:
    """The outputs of one run; what was written beside them goes to the verdict."""
    fresh = case.mode == "plain"
    memory = [n for n in case.memory() if n in case.shapes or not fresh]
    bases = _bases(case, memory, oracle.values, poison)
    got = function({n: jnp.asarray(x) for n, x in bases.items()})
    found, expected = {}, {n: x.copy() for n, x in bases.items()}
    for (name, target), x in zip(case.targets.items(), got, strict=True):
        after = np.asarray(x)
        if fresh:
            found[name] = after
            continue
        found[name] = _place(case, target, after)
        _place(case, target, expected[_array(case, target)])[...] = found[name]
    for (name, target), x in zip(case.targets.items(), got, strict=True):
        if not fresh and expected[_array(case, target)].tobytes() != np.asarray(x).tobytes():
            verdict.problems.append(f"{case.fusion}: elements outside the view of {name} were written")
    return found


class _Count:
    """How many kernels were built into programs in this process."""

    count = 0


@functools.lru_cache(maxsize=1)
def _counting() -> _Count:
    counter, original = _Count(), launch.kernel

    def counted(program):
        counter.count += 1
        return original(program)

    launch.kernel = counted
    return counter
