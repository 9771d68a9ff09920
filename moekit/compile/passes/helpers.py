"""Sections of a launch that differ in nothing but tensors and in where their indices begin are printed as one helper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moekit.compile import tile as t


@dataclass(frozen=True)
class Helper:
    """The text of `section` serves all of `calls`: each a section with the numbers that stand for `starts`, by name.

    `starts` has the indices, with the tensor each is one of, whose beginning the helper is told.
    """

    section: t.TileProgram
    starts: dict[tuple[str, t.Index], str]
    calls: tuple[tuple[t.TileProgram, tuple[int, ...]], ...]


def helpers(kernel: t.Kernel) -> tuple[Helper, ...]:
    """What the sections of a kernel are printed as; each section is called once."""
    groups: list[list[t.TileProgram]] = []
    for section in kernel.sections:
        group = next((g for g in groups if _said(g[0]) == _said(section) and _apart([*g, section]) is not None), None)
        if group is None:
            groups.append([section])
        else:
            group.append(section)
    return tuple(_helper(group) for group in groups)


def _helper(group: list[t.TileProgram]) -> Helper:
    apart = _apart(group) or {}
    calls = tuple((section, tuple(begin[i] for begin in apart.values())) for i, section in enumerate(group))
    tensors = {names[0]: _common(names) for names in zip(*([p.name for p in s.params] for s in group), strict=True)}
    if len(set(tensors.values())) < len(tensors):
        tensors = {name: name for name in tensors}
    starts: dict[tuple[str, t.Index], str] = {}
    for tensor, at in apart:
        name, before = tensors[tensor], sum(other == tensors[tensor] for other, _ in starts)
        starts[name, at] = f"{name}_first" + (f"_{before}" if before else "")
    return Helper(_renamed(group, tensors), starts, calls)


def _common(names: Sequence[str]) -> str:
    """The words that names have in common, else the first name: what `gate_acc` and `up_acc` are both."""
    words = [word for word in names[0].split("_") if all(word in name.split("_") for name in names)]
    return "_".join(words) or names[0]


def _renamed(group: list[t.TileProgram], tensors: Mapping[str, str]) -> t.TileProgram:
    """The first section under the names that all of a group have in common, called after all of them."""
    first, *others = group
    same = zip(*([*_values(section)] for section in group), strict=True)
    values = {values[0]: replace(values[0], name=_common([v.name for v in values])) for values in same}
    more = [word for section in others for word in section.name.split("_") if word not in first.name.split("_")]
    params = tuple(replace(p, name=tensors[p.name]) for p in first.params)
    body = _on(t.substitute(first.body, values), tensors)
    return replace(first, name="_".join([first.name, *more]), params=params, body=body)


def _values(section: t.TileProgram) -> Iterator[t.Value]:
    for op, _ in t.walk(section.body):
        yield from (*op.vars, *op.carries, *op.outs) if isinstance(op, t.Loop) else t.results(op)


def _apart(group: list[t.TileProgram]) -> dict[tuple[str, t.Index], tuple[int, ...]] | None:
    """Indices of the first section that begin elsewhere in others, and where in each.

    None where one index of the first stands for several of another.
    """
    found: dict[tuple[str, t.Index], tuple[int, ...]] = {}
    for (tensor, at), *others in zip(*map(_indices, group), strict=True):
        starts = (at.start, *(other.start for _, other in others))
        if found.setdefault((tensor, at), starts) != starts:
            return None
    return {index: starts for index, starts in found.items() if len(set(starts)) > 1}


def _indices(section: t.TileProgram) -> Iterator[tuple[str, t.Index]]:
    for op, _ in t.walk(section.body):
        if isinstance(op, t.Memory):
            yield from ((op.at.tensor, at) for at in op.at.index)


def _said(section: t.TileProgram) -> tuple:
    """All that a section says but for the names of tensors and where indices begin."""
    number = {p.name: str(i) for i, p in enumerate(section.params)}
    params = tuple(replace(p, name=number[p.name]) for p in section.params)
    return _on(section.body, number, begun=0), params, section.axes, section.grid


def _on[T](part: T, tensors: Mapping[str, str], begun: int | None = None) -> T:
    """A part of a program on other tensors; `begun`: where all indices begin, if said."""

    def moved(x: Any) -> Any:
        if isinstance(x, t.Index) and begun is not None:
            return replace(x, start=begun)
        return replace(x, tensor=tensors[x.tensor]) if isinstance(x, t.Access) else x

    return t.rebuilt(part, moved)
