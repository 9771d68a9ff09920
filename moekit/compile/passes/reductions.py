"""Reductions and contractions: whole in one block, or accumulated in a loop that equally deep ones share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier
from moekit.compile.passes.scope import Scope, Writer
from moekit.compile.schedule.facts import FOLDS, Twins, ends, part_axis, twice_axis
from moekit.lang.dtypes import STORED
from moekit.lang.elementwise import COMBINE, IDENTITY
from moekit.lang.graph import Node


@dataclass(frozen=True)
class Total:
    """What a loop adds up: the fold `first`, or it and its twin. `axes`: those of the result's block.

    `at_once`: each turn brings its block together, for others of the loop that need what there is so far: the largest score of
    a sum of exponentials, and that sum.
    """

    first: int
    node: Node
    name: str
    line: str
    axes: frozenset[str]
    pair: Twins | None = None
    at_once: bool = False

    @property
    def kind(self) -> str:
        """sum, max or min."""
        return _kind(self.node)


def reduction(low: Writer, node: int, n: Node, home: Scope) -> t.Value:
    """The block of a fold."""
    axis = n.attr("axis")
    if low.graph.axes[axis] == 0:  # a block has one element at least, and nothing would mask it
        total = _total(low, node)
        return _identity(home, total, total.axes)
    if axis in low.looped:
        return _in_loops(low, node, n, home)
    if n.op == "exp_sum":
        return _exp_sum(low, home, _total(low, node), _weights(low, home, n)[1], None)
    if pair := next((p for p in low.pairs if node in p.nodes), None):
        total = _total(low, pair.nodes[0], pair)
        product = _dot(home, axis, low.value(pair.left, home), _columns(low, pair, home), None, total.name)
        home.made |= _halves(low, pair, product, home)
        return home.made[node]
    if low.is_dot(node):
        left, right = (low.value(a, home) for a in n.args)
        return _dot(home, axis, left, right, None, low.graph.names.get(node, "acc"))
    return _reduce(low, home, _total(low, node), _operand(low, n, home))


def _reduce(low: Writer, scope: Scope, total: Total, value: t.Value) -> t.Value:
    """What is left along the axis brought together; nothing to do where a block has one element of it."""
    low.numbers.line, axis = total.line, total.node.attr("axis")
    return scope.emit(t.Reduce, total.name, op=total.kind, value=value, axis=axis) if axis in value.axes else value


def _operand(low: Writer, n: Node, scope: Scope) -> t.Value:
    """What a reduction adds up: the operand, or the product of a contraction's operands in float32, stored ones at once so."""
    if n.op == "reduce":
        return low.value(n.args[0], scope)
    stored = [low.graph.nodes[a].op == "cast" and low.graph.nodes[low.graph.nodes[a].args[0]].dtype in STORED for a in n.args]
    args = [low.value(low.graph.nodes[a].args[0] if s else a, scope) for a, s in zip(n.args, stored, strict=True)]
    left, right = (scope.cast(v, "float32") for v in args)
    return scope.binary("mul", left, right)


def _dot(scope: Scope, axis: str, left: t.Value, right: t.Value, acc: t.Value | None, name: str) -> t.Value:
    rows = scope.program.ordered({*left.axes, *right.axes} - {axis})[0]
    if rows in right.axes:
        left, right = right, left
    return scope.emit(t.Dot, name, left=left, right=right, axis=axis, acc=acc)


def _in_loops(low: Writer, node: int, n: Node, home: Scope) -> t.Value:
    """Open one loop for this reduction and for all that are as deep, over the same axis and in the same scope."""
    axis = n.attr("axis")
    group = [m for m in low.graph.live() if _shares_loop(low, m, node, axis) and m not in home.made]
    twins = {m: pair for pair in low.pairs for m in pair.nodes if set(pair.nodes) <= set(group)}
    tops = {low.graph.nodes[m].args[2] for m in group if low.graph.nodes[m].op == "exp_sum"} & set(group)
    group.sort(key=lambda m: m not in tops)
    totals = [_total(low, m, twins.get(m), m in tops) for m in group if m not in twins or m == twins[m].nodes[0]]
    end = _end(low, group, axis, home)
    made = _in_parts(low, totals, axis, home, end) if axis in low.section.parts else _looped(low, totals, axis, home, end)
    for total, value in zip(totals, made, strict=True):
        home.made |= _halves(low, total.pair, value, home) if total.pair else {total.first: value}
    return home.made[node]


def _end(low: Writer, group: list[int], axis: str, home: Scope) -> t.Value | None:
    """Where a program can leave a loop over `axis`, if all that it folds ends at one element."""
    found = {ends(low.graph, m) for m in group}
    end, extent = found.pop() if len(found) == 1 else None, home.program.axis(axis).extent
    if end is None or (value := low.value(end, home)).axes:
        return None
    most = home.const(extent) if extent is not None else home.emit(t.Extent, axis=axis)
    return home.binary("maximum", home.binary("minimum", value, most), home.const(0), f"{identifier(axis)}_end")


def _in_parts(low: Writer, totals: list[Total], axis: str, home: Scope, end: t.Value | None) -> Iterable[t.Value]:
    """Reductions part by part, the parts' results added up in the order in which a split's second launch adds them."""

    def body(scope: Scope, carries: tuple[t.Value, ...]) -> list[t.Value]:
        done = zip(totals, carries, _looped(low, totals, axis, scope, end), strict=True)
        return [_joined(scope, total, carry, value) for total, carry, value in done]

    names, inits = [f"{total.name}_total" for total in totals], [_identity(home, total, total.axes) for total in totals]
    if end is None:
        return low.loop(home, part_axis(axis), names, inits, body)
    share = home.program.axis(axis).share
    parts = home.binary("floordiv", home.binary("add", end, home.const(share - 1)), home.const(share))
    return low.loop(home, part_axis(axis), names, inits, body, parts)


def _looped(low: Writer, totals: list[Total], axis: str, home: Scope, end: t.Value | None) -> Iterable[t.Value]:
    """One loop over the blocks of `axis`, and what it leaves of each reduction brought together.

    Parts of a number of elements each end with the axis at the latest: the last one may have fewer.
    """
    block, ended = home.program.axis(axis), end is not None
    if not ended and block.each and (block.extent or 0) % block.each:
        end = home.const(block.extent or 0)
    if end is not None and block.parts > 1:
        left = home.binary("sub", end, home.binary("mul", home.elements(part_axis(axis)), home.const(block.share)))
        end = home.binary("minimum", left, home.const(block.share), f"{identifier(axis)}_left")

    def body(scope: Scope, carries: tuple[t.Value, ...]) -> list[t.Value]:
        if ended:
            scope.ended[axis] = ends(low.graph, totals[0].first) or 0
        return [_turn(low, total, axis, scope, carry) for total, carry in zip(totals, carries, strict=True)]

    names, inits = [f"{total.name}_acc" for total in totals], [_identity(home, x, _accumulated(low, x)) for x in totals]
    outs = low.loop(home, axis, names, inits, body, end)
    return [_reduce(low, home, total, out) for total, out in zip(totals, outs, strict=True)]


def _joined(scope: Scope, total: Total, carry: t.Value, value: t.Value) -> t.Value:
    """What the parts so far and one more are together."""
    if total.at_once and total.node.op == "reduce":
        return _top(scope, total.first, carry, value, value)
    old, weights = scope.weights.get(total.node.args[2], (None, value)) if total.at_once else (None, value)
    if old is not None:
        return scope.binary("add", scope.binary("mul", carry, old), scope.binary("mul", weights, value), carry.name)
    return scope.binary(COMBINE[total.kind], carry, value, carry.name)


def _top(scope: Scope, node: int, carry: t.Value, largest: t.Value, scores: t.Value) -> t.Value:
    """The largest score so far, with what it makes of those before and of these."""
    top = scope.binary("maximum", carry, largest, carry.name)
    shift = _shift(scope, top)
    old = scope.emit(t.Unary, "kept", op="exp", value=scope.binary("sub", carry, shift))
    scope.weights[node] = old, scope.emit(t.Unary, "weights", op="exp", value=scope.binary("sub", scores, shift))
    return top


def _shift(scope: Scope, top: t.Value) -> t.Value:
    """The largest score, or nothing where there is none: no difference is then that of two infinities."""
    lowest = scope.const(IDENTITY["max", "float32"], "float32")
    return scope.where(scope.binary("eq", top, lowest), scope.const(0.0, "float32"), top)


def _weights(low: Writer, scope: Scope, n: Node) -> tuple[t.Value | None, t.Value]:
    """What an `exp_sum` weighs its values by here; and, in the loop that finds its largest score, those before."""
    scores, _, top = n.args
    if top not in scope.weights:
        away = scope.binary("sub", low.value(scores, scope), _shift(scope, low.value(top, scope)))
        scope.weights[top] = None, scope.emit(t.Unary, "weights", op="exp", value=away)
    return scope.weights[top]


def _exp_sum(low: Writer, scope: Scope, total: Total, weights: t.Value, acc: t.Value | None) -> t.Value:
    """Σ weight·value of a block, on top of `acc`. Narrow values have narrow weights."""
    n = total.node
    value, weights = low.value(n.args[1], scope), scope.cast(weights, n.attr("weights"))
    if low.is_dot(total.first):
        return _dot(scope, n.attr("axis"), weights, value, acc, total.name)
    one = low.graph.nodes[n.args[1]].op == "const" and low.graph.nodes[n.args[1]].attr("value") == 1
    weights = scope.cast(weights, "float32")
    made = _reduce(low, scope, total, weights if one else scope.binary("mul", weights, scope.cast(value, "float32")))
    return made if acc is None else scope.binary("add", acc, made, acc.name)


def _identity(home: Scope, total: Total, axes: Collection[str]) -> t.Value:
    """What an accumulator begins from."""
    return home.const(IDENTITY[total.kind, total.node.dtype], total.node.dtype, axes)


def _turn(low: Writer, total: Total, axis: str, scope: Scope, carry: t.Value) -> t.Value:
    """One turn of a reduction."""
    low.numbers.line = total.line
    if total.pair is not None:
        return _dot(scope, axis, low.value(total.pair.left, scope), _columns(low, total.pair, scope), carry, carry.name)
    if total.node.op == "exp_sum":
        old, weights = _weights(low, scope, total.node)
        before = carry if old is None else scope.binary("mul", carry, old, carry.name)
        return _exp_sum(low, scope, total, weights, before)
    if low.is_dot(total.first):
        left, right = (low.value(a, scope) for a in total.node.args)
        return _dot(scope, axis, left, right, carry, carry.name)
    value = _operand(low, total.node, scope)
    if total.at_once:
        return _top(scope, total.first, carry, _reduce(low, scope, total, value), value)
    return scope.emit(t.Accumulate, carry.name, op=total.kind, acc=carry, value=value, axis=axis)


def _accumulated(low: Writer, total: Total) -> Collection[str]:
    """The axes of an accumulator: those of the result for a product, of what is added up for a sum."""
    if total.pair or total.at_once or low.is_dot(total.first):
        return total.axes
    return {a for arg in total.node.args for a in low.graph.nodes[arg].axes}


def _columns(low: Writer, pair: Twins, scope: Scope) -> t.Value:
    """Both right operands of a pair in one block."""
    twice = twice_axis(pair.column)
    if twice not in low.root.bound:
        low.root.bind(twice)
    sides = low.root.emit(t.Sides, axis=twice, apart=pair.second.start - pair.first.start)
    each = pair.first.each(lambda axis: low.root.bound[twice] if axis == pair.column else scope.elements(axis))
    index = t.Index((*each.terms, (sides, 1)), pair.first.start)
    return low.read(pair.right, scope, {pair.dim: index})


def _halves(low: Writer, pair: Twins, product: t.Value, home: Scope) -> dict[int, t.Value]:
    """What each of a pair is of their product."""
    totals, outs = [_total(low, m) for m in pair.nodes], []
    for total in totals:
        low.numbers.line = total.line
        outs.append(low.numbers.value(product.dtype, low.program.blocked(total.axes), total.name))
    home.ops.append(t.Halves((outs[0], outs[1]), product, twice_axis(pair.column)))
    return dict(zip(pair.nodes, outs, strict=True))


def _total(low: Writer, node: int, pair: Twins | None = None, at_once: bool = False) -> Total:
    n, graph = low.graph.nodes[node], low.graph
    said = filter(None, (graph.names.get(m) for m in (pair.nodes if pair else (node,))))
    name = "_".join(said) or (
        "top" if at_once else "weighed" if n.op == "exp_sum" else f"{_kind(n)}_{identifier(n.attr('axis'))}"
    )
    axes = {twice_axis(a) if pair and a == pair.column else a for a in n.axes}
    return Total(node, n, name, graph.lines.get(node, ""), frozenset(axes), pair, at_once or n.op == "exp_sum")


def _shares_loop(low: Writer, other: int, node: int, axis: str) -> bool:
    a, b = low.graph.nodes[other], low.graph.nodes[node]
    if a.op not in FOLDS or a.attr("axis") != axis or low.level[other] != low.level[node]:
        return False
    return low.looped & set(a.axes) == low.looped & set(b.axes)


def _kind(n: Node) -> str:
    return n.attr("kind") if n.op == "reduce" else "sum"
