"""Sections of a launch that differ in nothing but tensors and in where their indices begin are printed as one helper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moekit.compile import tile as t


@dataclass(frozen=True)
class Helper:
    """The text of `section` serves all of `calls`: each a section with the numbers that stand for `starts`, by name.

    `starts` has the indices, with the tensor each is one of, whose beginning the helper is told.
    """

    section: t.TileProgram
    starts: dict[tuple[str, t.At], str]
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
    return Helper(group[0], {index: name for index, (name, _) in apart.items()}, tuple(
        (section, tuple(starts[i] for _, starts in apart.values())) for i, section in enumerate(group)
    ))  # fmt: skip


def _apart(group: list[t.TileProgram]) -> dict[tuple[str, t.At], tuple[str, tuple[int, ...]]] | None:
    """Indices of the first section that begin elsewhere in others: what the beginning is called, and what it is in each.

    None where one index of the first stands for several of another.
    """
    found: dict[tuple[str, t.At], tuple[str, tuple[int, ...]]] = {}
    for (tensor, at), *others in zip(*map(_indices, group), strict=True):
        starts = (at.start, *(other.start for _, other in others))
        if found.setdefault((tensor, at), (f"{tensor}_first", starts))[1] != starts:
            return None
    return {index: said for index, said in found.items() if len(set(said[1])) > 1}


def _indices(section: t.TileProgram) -> Iterator[tuple[str, t.At]]:
    for op, _ in t.walk(section.body):
        if isinstance(op, t.Memory):
            yield from ((op.at.tensor, at) for at in op.at.index)


def _said(section: t.TileProgram) -> tuple:
    """All that a section says but for the names of tensors and where indices begin."""
    number = {p.name: str(i) for i, p in enumerate(section.params)}

    def visit(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(visit, x))
        if isinstance(x, t.At):
            x = replace(x, start=0)
        if isinstance(x, t.Access):
            x = replace(x, tensor=number[x.tensor])
        if isinstance(x, t.Value) or not hasattr(x, "__dataclass_fields__"):
            return x
        return replace(x, **{n: visit(getattr(x, n)) for n in x.__dataclass_fields__})

    params = tuple(replace(p, name=number[p.name]) for p in section.params)
    return visit(section.body), params, section.axes, section.grid
