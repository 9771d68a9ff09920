"""A program's operations as text."""

from __future__ import annotations

from moekit.compile.tile.flow import results
from moekit.compile.tile.operations import Access, AtEnd, Loop, Op, Value
from moekit.lang.graph import Index


def text_of(body: tuple[Op, ...], depth: int) -> list[str]:
    """The program text of `moekit show --as tile`."""
    lines, pad = [], "  " * depth
    for op in body:
        if not isinstance(op, Loop | AtEnd):
            fields = {n: getattr(op, n) for n in op.__dataclass_fields__ if n not in ("out", "outs")}
            said = ", ".join(f"{n}={_short(x)}" for n, x in fields.items() if x is not None)
            left = ", ".join(map(str, results(op)))
            lines.append(f"{pad}{left}{' = ' * bool(left)}{type(op).__name__}({said})")
            continue
        if isinstance(op, Loop):
            carried = ", ".join(f"{c} = {i.label}" for c, i in zip(op.carries, op.inits, strict=False))
            over = ", ".join(f"{v.label} over {a}" for v, a in zip(op.vars, op.over, strict=False))
            ends = f" to {op.end.label}" if op.end is not None else ""
            lines.append(f"{pad}loop {over}{ends} ({carried})" + " unrolled" * op.unroll)
        else:
            lines.append(f"{pad}at the end of {op.axis}, otherwise {_short(op.otherwise)}")
        lines += text_of(op.body, depth + 1)
        lines.append(f"{pad}  yield {_short(op.yields)} -> {', '.join(map(str, op.outs))}")
    return lines


def _short(part) -> str:
    if isinstance(part, Value):
        return part.label
    if isinstance(part, tuple):
        return "(" + ", ".join(map(_short, part)) + ")"
    if isinstance(part, Index):
        terms = [f"{step}*" * (step != 1) + value.label for value, step in part.terms]
        return " + ".join([*terms, *([str(part.start)] if part.start or not terms else [])])
    if isinstance(part, Access):
        mask = f" if {' & '.join(m.label for m in part.mask)}" if part.mask else ""
        wide = " in 64 bits along " + ", ".join(str(d) for d, w in enumerate(part.wide) if w) if any(part.wide) else ""
        return f"{part.tensor}[{', '.join(map(_short, part.index))}]{mask}{wide}"
    return str(part)
