"""Properties of any declaration, each a function of a case and an implementation that returns what is wrong.

They follow from the declaration: which axes are independent, what is read and written, which outputs no reduction reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moekit.compile.schedule.facts import axis_uses, gathered
from moekit.errors import AliasError
from moekit.lang.dtypes import numpy_dtype
from moekit.lang.graph import Graph, made_of
from moekit.testing.batch import run_alone, run_case
from moekit.testing.case import FuzzCase, read_ids, unique_ids
from moekit.testing.exchange import ranks_add_up
from moekit.testing.executors import JAX, Executor, Torch, to_numpy
from moekit.testing.executors import executor as make_executor
from moekit.testing.guard import POISONS, Arena, Placed, place
from moekit.testing.oracle import Oracle

SCALE = 4.0


def outputs(executor: Executor, case: FuzzCase, values: Mapping[str, np.ndarray] | None = None) -> Mapping[str, np.ndarray]:
    """The outputs of one run; raises what the implementation raises."""
    return run_alone(executor, case, values).outputs


def _wrong(executor: Executor, case: FuzzCase, got: Mapping[str, np.ndarray]) -> list[str]:
    return [*Oracle.of(case, executor.name, executor.standard).compare(got).problems]


def _laid_out(executor: Executor, case: FuzzCase, values: Mapping[str, np.ndarray]) -> tuple[Placed, Any, dict[str, Any]]:
    """A case in memory: where its tensors are, the memory, and the tensors by name."""
    placed = place(arena := Arena(), case, values)
    memory = executor.upload(arena, arena.image(POISONS[0]))
    return placed, memory, {n: executor.tensor(memory, s) for n, s in placed.slots.items()}


def agreement(executor: Executor, case: FuzzCase) -> list[str]:
    """The outputs lie within the bound of the reference."""
    return _wrong(executor, case, outputs(executor, case))


def repeatable(executor: Executor, case: FuzzCase) -> list[str]:
    """Two runs give the same bits."""
    return _unequal(outputs(executor, case), outputs(executor, case), "in a second run")


def layouts_do_not_matter(executor: Executor, case: FuzzCase) -> list[str]:
    """Outputs that no float reduction reaches have the same bits for contiguous tensors; the others stay within the bound."""
    values, plain = case.values(), replace(case, layouts={}, mode="out")
    here, there = outputs(executor, case, values), outputs(executor, plain, values)
    exact = {n: x for n, x in here.items() if not _reduced(case.graph, n)}
    return _unequal(exact, there, "with contiguous tensors") + _wrong(executor, case, there)


def rows_are_independent(executor: Executor, case: FuzzCase) -> list[str]:
    """A token's results do not depend on the tokens beside it: permuted, cut off or padded, the bits are the same."""
    axis = token_axis(case)
    if axis is None or case.extents[axis] < 2:
        return []
    case, values, n = replace(case, layouts={}), case.values(), case.extents[axis]
    rng = np.random.default_rng(case.seed)
    whole, found = outputs(executor, case, values), []
    for text, index in (("with the tokens permuted", rng.permutation(n)), ("with fewer tokens", np.arange(max(1, n // 2))),
                        ("with other tokens behind", np.concatenate([np.arange(n), rng.integers(0, n, 3)]))):  # fmt: skip
        size, along = min(n, len(index)), {name: case.graph.tensors[name].axes for name in (*case.shapes, *whole)}
        taken = {name: _stained(take(x, along[name], axis, index), along[name], axis, n) for name, x in values.items()}
        got = outputs(executor, replace(case, sizes={**case.sizes, axis: len(index)}), taken)
        wanted = {name: take(x, along[name], axis, index[:size]) for name, x in whole.items()}
        found += _unequal(wanted, {name: take(x, along[name], axis, np.arange(size)) for name, x in got.items()}, text)
    return found


def scaling(executor: Executor, case: FuzzCase, names: tuple[str, ...]) -> list[str]:
    """Where the outputs are linear in operands `names` together, a power of two passes through without rounding."""
    values = {n: np.where(np.isfinite(x.astype(np.float64)), x, 0).astype(x.dtype) for n, x in case.values().items()}
    scaled = {n: (x.astype(np.float32) * SCALE).astype(x.dtype) if n in names else x for n, x in values.items()}
    once, more = outputs(executor, case, values), outputs(executor, case, scaled)
    found = []
    for n, x in once.items():
        wanted = x.astype(np.float64) * SCALE
        tame = (np.abs(wanted) < 1e4) & (np.abs(wanted) > 1e-3)
        if (bad := tame & (wanted != more[n].astype(np.float64))).any():
            found.append(f"{case.fusion}: {n} is not {SCALE:g} times as large for {names} {SCALE:g} times as large, "
                         f"in {int(bad.sum())} of {bad.size} elements")  # fmt: skip
    return found


def in_place_is_out_of_place(executor: Executor, case: FuzzCase) -> list[str]:
    """Updating operands in place gives the bits that the plain form gives."""
    if all(n not in case.shapes for n in case.names):
        return []
    layouts = {n: case.layout(n) for n in case.layouts if not case.layout(n).zero}
    moved = {f"{n}_new": v for n, v in layouts.items() if n in case.names}
    values = replace(case, layouts=layouts).values()
    here = outputs(executor, replace(case, layouts=layouts, mode="in place"), values)
    there = outputs(executor, replace(case, layouts={**layouts, **moved}, mode="out"), values)
    return _unequal(here, there, "out of place")


def neighbours_are_apart(executor: Executor, case: FuzzCase) -> list[str]:
    """Tensors that take turns in one array, element by element, overlap nowhere: they are accepted and left in peace."""
    mode = "in place" if any(n in case.shapes for n in case.names) else "out"
    case = replace(case, layouts={}, mode=mode, woven=True)
    return run_case(executor, case).problems


def rows_between_rows(executor: Executor, case: FuzzCase) -> list[str]:
    """An output whose rows reach into each other and share no element is accepted and right: strides 2·n - 3 and 2."""
    if not isinstance(executor, Torch):
        return []
    case = replace(case, layouts={}, mode="out")
    _, _, tensors = _laid_out(executor, case, case.values())
    for target in case.targets.values():
        if len(shape := case.shape(target)) == 2 and shape[0] > 1 and shape[1] > 2:
            empty = tensors[target].new_zeros(shape[0] * 2 * shape[1])
            tensors[target] = executor.torch.as_strided(empty, shape, (2 * shape[1] - 3, 2))
    executor.call(case, tensors)
    return _wrong(executor, case, {n: to_numpy(tensors[t]) for n, t in case.targets.items()})


def overlap_is_refused(executor: Executor, case: FuzzCase) -> list[str]:
    """An output that shares bytes with itself, or with an operand that it is not all of, is refused before anything is written.

    Tried are outputs one element beside an operand of their dtype, at its last element, over the upper halves of an operand of
    a wider dtype, of stride 0, and of two strides that are the same; in JAX, Views that have one element in common.
    """
    if executor.name in JAX:
        return _views_refused(executor, case)
    if not isinstance(executor, Torch) or any(0 in case.shape(n) for n in case.memory()):
        return []
    case, found = replace(case, layouts={}, mode="out"), []
    placed, memory, tensors = _laid_out(executor, case, case.values())
    for output, target in case.targets.items():
        flat, shape = memory.view(tensors[target].dtype), tensors[target].shape
        for how, strides, start in _overlapping(case, placed, tensors, target):
            if start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= flat.numel():
                continue
            before = executor.download(placed.arena, memory).copy()
            try:
                executor.call(case, {**tensors, target: executor.torch.as_strided(flat, shape, strides, start)})
                found.append(f"{case.fusion}: {output} with {how} was not refused")
            except AliasError:
                if not np.array_equal(before, executor.download(placed.arena, memory)):
                    found.append(f"{case.fusion}: memory was written before {output} with {how} was refused")
    return found


def _overlapping(case: FuzzCase, placed: Placed, tensors: Mapping[str, Any], target: str) -> Iterator[tuple]:
    """Where an output must not lie: in words, its strides, and its first element."""
    out, at = tensors[target], placed.slots[target].start
    shape, strides = out.shape, out.stride()
    if len(shape) and shape[0] > 1:
        yield "stride 0", (0, *strides[1:]), at
    if len(shape) > 1 and shape[0] > 1 and shape[1] > 1:
        yield "strides that are the same", (strides[1], *strides[1:]), at
    for operand in case.shapes:
        x, wider = tensors[operand], tensors[operand].element_size() // out.element_size()
        if x.numel() > 1 and len(shape) and (wider > 1 or x.dtype == out.dtype):
            start = placed.slots[operand].start * wider
            yield f"one element beside {operand}, over it,", tuple(s * wider for s in strides), start + 1
            yield f"its first element the last of {operand}", strides, start + (x.numel() - 1) * wider


def _views_refused(executor: Executor, case: FuzzCase) -> list[str]:
    """Views of one base are refused if the first element of an output is the last of an operand, or of another output."""
    import jax

    from moekit.jax import View, op, view

    face, found = op(case.declaration), []
    if "int64" in case.dtypes.values() and not jax.config.read("jax_enable_x64"):  # refused for that
        return found
    for output in case.names:
        for other in (*case.shapes, *(n for n in case.names if n not in case.shapes and n != output)):
            mine, theirs = case.shape(output), case.shape(other)
            if len(mine) != len(theirs) or 0 in (*mine, *theirs) or case.dtype(output) != case.dtype(other):
                continue
            if output == other and set(mine) <= {1}:  # which is then all of itself, as an update in place is
                continue
            extents = [m + n - 1 for m, n in zip(mine, theirs, strict=True)]
            base, rank = view(np.zeros(extents, numpy_dtype(case.dtype(output)))).base, len(mine)
            outs: dict[str, Any] = {**dict.fromkeys(case.names)}
            operands: dict[str, Any] = case.values()
            outs[output] = View(base, tuple(range(rank)), tuple(n - 1 for n in theirs), (1,) * rank, mine)
            met = View(base, tuple(range(rank)), (0,) * rank, (1,) * rank, theirs)
            (operands if other in case.shapes else outs)[other] = met
            try:
                face(*operands.values(), **case.params, implementation=executor.name, out=tuple(outs.values()))
                found.append(f"{case.fusion}: {output} with its first element the last of {other} was not refused")
            except AliasError:
                continue
    return found


def operands_may_be_one(executor: Executor, case: FuzzCase) -> list[str]:
    """One tensor for two operands, where outputs have memory of their own, is read twice and stays as it is."""
    updated = [n for n in case.shapes if n in case.names]
    alike = lambda a, b: case.shapes[a] == case.shapes[b] and case.dtypes[a] == case.dtypes[b]  # noqa: E731
    pairs = [(a, b) for a in (*updated, *case.shapes) for b in case.shapes if a != b and alike(a, b)]
    if not pairs or {*pairs[0]} & {*unique_ids(case.graph), *read_ids(case.graph)}:
        return []
    case = replace(case, layouts={}, mode="plain" if executor.name in JAX else "out")
    values, (one, two) = case.values(), pairs[0]
    values[two] = values[one]
    oracle = Oracle.of(case, executor.name, executor.standard, values)
    if executor.name in JAX:
        from moekit.jax import op, view

        arrays = {n: view(x).base for n, x in values.items()}
        arrays[two] = arrays[one]
        got = op(case.declaration)(*arrays.values(), **case.params, implementation=executor.name)
        outs = zip(case.names, got if isinstance(got, tuple) else (got,), strict=True)
        return [*oracle.compare({n: np.asarray(x) for n, x in outs}).problems]
    placed, memory, tensors = _laid_out(executor, case, values)
    executor.call(case, {**tensors, two: tensors[one]})
    return [*oracle.compare(placed.outputs(executor.download(placed.arena, memory))).problems]


def same_in_both_frameworks(case: FuzzCase, executor: Executor, implementation: str = "xla") -> list[str]:
    """PyTorch's outputs and JAX's, on the same bytes, both lie within the bound: each is held to the one reference."""
    other = make_executor(implementation)
    return agreement(executor, case) + agreement(other, replace(case, schedule="heuristic"))


def token_axis(case: FuzzCase) -> str | None:
    """A dynamic axis whose elements are independent: every output varies over it, and nothing is reduced or chosen along it."""
    graph = case.graph
    free = [a for a, use in axis_uses(graph).items() if use.parallel and a in case.declaration.dynamic and a in case.sizes]
    if any(w.ids for w in graph.writes) or any(n.op == "extent" for n in graph.nodes):
        return None
    free = [a for a in free if a not in gathered(graph)]
    indexed = {a for n in graph.nodes if n.op == "iota" for a in n.attr("index").axes}
    return next((a for a in free if a not in indexed), None)


def take(x: np.ndarray, axes: tuple[str | None, ...], axis: str, index: np.ndarray) -> np.ndarray:
    """Elements `index` along an axis of a tensor with these axes, all of it where it does not vary along that axis."""
    return np.ascontiguousarray(np.take(x, index, axis=axes.index(axis))) if axis in axes else x


def _stained(x: np.ndarray, axes: tuple[str | None, ...], axis: str, n: int) -> np.ndarray:
    """The tensor with infinities in the rows from `n` on: padding that must not leak into the others."""
    if axis in axes and x.dtype.kind not in "iub":
        x = x.copy()
        np.moveaxis(x, axes.index(axis), 0)[n:] = np.inf
    return x


def _reduced(graph: Graph, output: str) -> bool:
    """Whether a float reduction lies behind an output."""
    value = next(w.value for w in graph.writes if w.tensor == output)
    nodes = [graph.nodes[i] for i in made_of(graph.nodes, value)]
    return any(n.op in ("contract", "exp_sum", "cumsum") or (n.op == "reduce" and n.attr("kind") == "sum") for n in nodes)


def _unequal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], text: str) -> list[str]:
    found = []
    for name, x in a.items():
        same = (x == b[name]) | ((x != x) & (b[name] != b[name]))
        if not np.all(same):
            at = tuple(int(i) for i in np.argwhere(~same)[0])
            found.append(
                f"{name}{list(at)} is {x[at]}, but {b[name][at]} {text}; {int((~same).sum())} of {x.size} elements differ"
            )
    return found


PROPERTIES: dict[str, Callable[[Executor, FuzzCase], list[str]]] = {
    "agreement": agreement,
    "repeatable": repeatable,
    "layouts do not matter": layouts_do_not_matter,
    "rows are independent": rows_are_independent,
    "in place is out of place": in_place_is_out_of_place,
    "overlap is refused": overlap_is_refused,
    "operands may be one": operands_may_be_one,
    "neighbours are apart": neighbours_are_apart,
    "rows between rows": rows_between_rows,
    "ranks add up": ranks_add_up,
}
