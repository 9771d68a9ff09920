"""Right operands of products have elements of their own, for targets that want to be told which thread holds what.

To a matrix unit a right operand's columns are as rows are, each in one thread's registers with its neighbours along the summed
axis; in the sum they lie side by side. Elements, masks and what follows from them cost nothing to say twice.
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile import tile as t


def rights(program: t.TileProgram) -> frozenset[t.Value]:
    """What right operands of products are made of, and have the columns' axis."""
    made = {v: op for op, _ in t.walk(program.body) if not isinstance(op, t.Loop | t.AtEnd | t.Dot) for v in t.results(op)}
    found: set[t.Value] = set()
    for product in (op for op, _ in t.walk(program.body) if isinstance(op, t.Dot)):
        left, (_, n) = [product.right], product.out.axes
        while left:
            if (value := left.pop()) in made and value not in found and n in value.axes:
                found.add(value)
                left += t.operands(made[value])
    return frozenset(found)


def apart(program: t.TileProgram) -> t.TileProgram:
    """The program with all that right operands are made of made anew beside what others read."""
    numbers, own = t.Numbers(program.body), {}
    for value in sorted(_whole(program, rights(program)), key=lambda v: v.number):
        own[value] = numbers.like(value)

    def made(op: t.Op) -> list[t.Op] | None:
        if isinstance(op, t.Dot):
            return [replace(op, right=own.get(op.right, op.right))]
        return None if isinstance(op, t.Loop | t.AtEnd) or not {*t.results(op)} & own.keys() else [op, t.substitute(op, own)]

    return replace(program, body=t.used(t.rewrite(program.body, made))) if own else program


def _whole(program: t.TileProgram, found: frozenset[t.Value]) -> set[t.Value]:
    """These values, and what is made of some of them for others: a mask along the axis that a product's operand is made anew
    for another's is of the new elements, too."""
    every, ops = {*found}, [op for op, _ in t.walk(program.body) if not isinstance(op, t.Loop | t.AtEnd | t.Dot)]
    wanted = {*found}
    for op in reversed(ops):  # operands come first
        wanted |= {*t.operands(op)} if wanted & {*t.results(op)} else set()
    for op in ops:
        every |= wanted & {*t.results(op)} if every & {*t.operands(op)} else set()
    return every
