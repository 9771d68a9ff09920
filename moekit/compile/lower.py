"""Graph + Schedule + layouts → TileProgram.

Values are made where they are first needed, in the outermost scope that binds the looped axes they vary over, so what
does not depend on a loop is computed before it. A reduction over a looped axis opens a loop; all reductions over the same
axis that are equally deep share one. Outputs are stored last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moekit.compile import tile as t
from moekit.compile.analysis import axis_uses, gathered, reach
from moekit.compile.naming import TEMPORARY, Names, identifier
from moekit.compile.schedule import Schedule, reduction_levels, uses_dot
from moekit.lang.graph import Along, Graph, Node, Write

IDENTITY = {
    ("sum", "float32"): 0.0,
    ("max", "float32"): float("-inf"),
    ("min", "float32"): float("inf"),
    ("sum", "int32"): 0,
    ("max", "int32"): -(2**31),
    ("min", "int32"): 2**31 - 1,
    ("sum", "int64"): 0,
    ("max", "int64"): -(2**63),
    ("min", "int64"): 2**63 - 1,
}
COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


@dataclass
class Scope:
    """A straight run of operations: the program's own, or a loop's body."""

    parent: Scope | None
    bound: dict[str, tuple[t.Value, t.Value | None]] = field(default_factory=dict)
    ops: list = field(default_factory=list)
    made: dict = field(default_factory=dict)

    def chain(self) -> list[Scope]:
        """The scopes around this one, outermost first, itself last."""
        return [*(self.parent.chain() if self.parent else []), self]


class Lowering:
    """One lowering of one graph; `lower` below is its only use."""

    def __init__(self, graph: Graph, schedule: Schedule, layouts: Mapping[str, t.Strided | t.Viewed], sizes: Mapping[str, int]):
        self.graph, self.schedule, self.layouts = graph, schedule, layouts
        extent = {a: sizes.get(a, s) for a, s in graph.axes.items()}
        parts = dict(schedule.split)
        self.blocks = {
            a: t.AxisBlock(a, extent[a], schedule.block(a), schedule.mode(a), parts.get(a, 1)) for a in axis_uses(graph)
        }
        self.gathered = {a: t.AxisBlock(a, extent[a], 1, "gather") for a in gathered(graph) if a not in self.blocks}
        self.looped = {a for a, b in self.blocks.items() if b.mode == "loop"}
        self.grid = self._grid()
        self.level, _ = reduction_levels(graph, self.looped)
        self.names = Names({a for a in graph.axes if a.isidentifier()})
        self.root = Scope(None)
        self.zeroed: dict[str, set[str]] = {}
        self.comments: dict[str, str] = {}
        self.last_line = ""

    def _grid(self) -> tuple[str, ...]:
        """Grid axes, dynamic ones outermost: only the outermost needs no division by its number of blocks."""
        axes = [a for a, b in self.blocks.items() if b.mode == "grid"]
        return tuple(sorted(axes, key=lambda a: self.graph.axes[a] is not None))

    def run(self, digest: str) -> t.TileProgram:
        """The program."""
        for axis, block in self.blocks.items():
            if block.mode != "loop":
                self._bind(self.root, axis, block)
        self._stores()
        used = {op.tensor for op in _memory_ops(self.root.ops)}
        params = tuple(
            t.Param(x.name, x.role, x.dtype, x.axes, self.layouts[x.name])
            for x in self.graph.tensors.values()
            if x.name in used or x.role != "In"
        )
        axes = (*self.blocks.values(), *self.gathered.values())
        s = self.schedule
        return t.TileProgram(
            self.graph.name, params, axes, self.grid, tuple(self.root.ops), s.warps, s.stages, digest, self.comments
        )

    # -- axes

    def _bind(self, scope: Scope, axis: str, block: t.AxisBlock, start: t.Value | None = None) -> None:
        """Give `axis` its index and mask in `scope`."""
        if block.mode == "grid" and (block.block == 1 or block.extent is None or block.extent > block.block):
            start = self._emit(scope, t.ProgramId, f"pid_{identifier(axis)}", "int32", (), axis=axis)
            if block.block > 1:
                start = self._binary(scope, "mul", start, self._const(scope, block.block), f"{identifier(axis)}_start")
        axes = (axis,) if block.block > 1 else ()
        index = self._emit(scope, t.Index, identifier(axis), "int32", axes, axis=axis, start=start)
        mask = None
        if block.partial:
            mask = self._emit(scope, t.InBounds, f"{identifier(axis)}_mask", "bool", axes, axis=axis, index=index)
        scope.bound[axis] = (index, mask)

    def _bound(self, scope: Scope, axis: str) -> tuple[t.Value, t.Value | None]:
        return next(s.bound[axis] for s in reversed(scope.chain()) if axis in s.bound)

    def _home(self, axes, scope: Scope) -> Scope:
        """The outermost scope around `scope` in which every looped axis of `axes` is bound."""
        needed, seen = self.looped & set(axes), set()
        for candidate in scope.chain():
            seen |= set(candidate.bound)
            if needed <= seen:
                return candidate
        raise AssertionError(f"no scope binds {needed - seen}")

    def _tile_axes(self, axes) -> tuple[str, ...]:
        return tuple(a for a in self.blocks if a in set(axes) and self.blocks[a].block > 1)

    # -- emission of single operations

    def _emit(self, scope: Scope, kind, hint: str, dtype: str, axes, **fields) -> t.Value:
        out = t.Value(self.names.fresh(hint), dtype, tuple(axes))
        scope.ops.append(kind(out=out, **fields))
        return out

    def _const(self, scope: Scope, value, dtype: str = "int32") -> t.Value:
        """A constant; one per scope chain and value."""
        key = ("const", repr(value), dtype)
        for s in scope.chain():
            if key in s.made:
                return s.made[key]
        self.root.made[key] = t.Value(self.names.fresh("c"), dtype)
        self.root.ops.append(t.Const(self.root.made[key], value))
        return self.root.made[key]

    def _binary(self, scope: Scope, op: str, a: t.Value, b: t.Value, hint: str = TEMPORARY) -> t.Value:
        dtype = "bool" if op in ("eq", "ne", "lt", "le", "gt", "ge") else a.dtype
        return self._emit(scope, t.Binary, hint, dtype, self._tile_axes((*a.axes, *b.axes)), op=op, left=a, right=b)

    def _where(self, scope: Scope, condition: t.Value, yes: t.Value, no: t.Value, hint: str = TEMPORARY) -> t.Value:
        axes = self._tile_axes((*condition.axes, *yes.axes, *no.axes))
        return self._emit(scope, t.Where, hint, yes.dtype, axes, condition=condition, yes=yes, no=no)

    def _all(self, scope: Scope, masks) -> t.Value | None:
        """The conjunction of masks, None for none."""
        masks = tuple(dict.fromkeys(m for m in masks if m is not None))
        if len(masks) < 2:
            return masks[0] if masks else None
        key = ("and", masks)
        if key not in scope.made:
            result = masks[0]
            for mask in masks[1:]:
                result = self._binary(scope, "and", result, mask, "mask")
            scope.made[key] = result
        return scope.made[key]

    def _remask(self, scope: Scope, value: t.Value, axis: str, identity) -> t.Value:
        """`value` with lanes beyond the end of `axis` replaced by `identity`."""
        mask = self._bound(scope, axis)[1]
        if mask is None or (identity == 0 and axis in self.zeroed.get(value.name, ())):
            return value
        masked = self._where(scope, mask, value, self._const(scope, identity, value.dtype), f"{value.name}_in")
        if identity == 0:
            self.zeroed[masked.name] = {*self.zeroed.get(value.name, ()), axis}
        return masked

    # -- graph nodes

    def value(self, node: int, scope: Scope) -> t.Value:
        """The block of a node, made in its home scope if it is not there yet."""
        home = self._home(self.graph.nodes[node].axes, scope)
        if node not in home.made:
            made = self._make(node, self.graph.nodes[node], home)
            home.made.setdefault(node, made)
        return home.made[node]

    def _make(self, node: int, n: Node, home: Scope) -> t.Value:
        if n.op in RULES:
            args = [self.value(a, home) for a in n.args]
            before = len(home.ops)
            out = RULES[n.op](self, n, home, args, self.graph.names.get(node))
            self._comment(node, home.ops[before:])
            return out
        if n.op == "read":
            return self._read(node, n, home)
        if n.op == "pick":
            return self.value(n.args[0], home)
        if n.op == "top_k":
            return self._top_k(node, n, home)
        return self._reduction(node, n, home)

    def _comment(self, node: int, ops: list) -> None:
        line = self.graph.lines.get(node, "")
        if ops and line and line != self.last_line and hasattr(ops[0], "out"):
            self.comments[ops[0].out.name] = self.last_line = line

    def _read(self, node: int, n: Node, home: Scope) -> t.Value:
        tensor = n.attr("tensor")
        index, wide, mask = self._address(tensor, n.attr("index"), n.args, home)
        hint = self.graph.names.get(node, tensor)
        before = len(home.ops)
        out = self._emit(
            home, t.Load, hint, n.dtype, self._tile_axes(n.axes), tensor=tensor, index=index, wide=wide, mask=mask
        )
        self._comment(node, home.ops[before:])
        self.zeroed[out.name] = {a for a in n.axes if self._bound(home, a)[1] is not None}
        return out

    def _address(self, tensor: str, index, args, scope: Scope):
        """Index values, their widths and the mask of a read or write."""
        dims = self.graph.tensors[tensor].dims
        values, wide, masks = [], [], []
        layout = self.layouts[tensor]
        everywhere = isinstance(layout, t.Strided) and layout.wide
        for dim, entry in zip(dims, index, strict=True):
            if isinstance(entry, Along):
                values.append(self._along(scope, entry))
                masks += [self._bound(scope, entry.axis)[1]] if entry.axis else []
                dynamic = entry.axis is not None and self.graph.axes[entry.axis] is None
            else:
                ids = self.value(args[entry.operand], scope)
                values.append(ids)
                masks += [self._bound(scope, a)[1] for a in self.graph.nodes[args[entry.operand]].axes]
                masks.append(self._in_range(scope, ids, dim.axis))
                dynamic = self.graph.axes[dim.axis] is None
            wide.append(isinstance(layout, t.Strided) and (everywhere or dynamic))
        return tuple(values), tuple(wide), self._all(scope, masks)

    def _along(self, scope: Scope, entry: Along) -> t.Value | None:
        """start + step · (index of the axis)."""
        if entry.axis is None:
            return self._const(scope, entry.start) if entry.start else None
        index, _ = self._bound(scope, entry.axis)
        home = self._home((entry.axis,), scope)
        key = ("along", entry)
        if key not in home.made:
            if entry.step != 1:
                index = self._binary(home, "mul", index, self._const(home, entry.step), index.name)
            if entry.start:
                index = self._binary(home, "add", index, self._const(home, entry.start), index.name)
            home.made[key] = index
        return home.made[key]

    def _in_range(self, scope: Scope, ids: t.Value, axis: str) -> t.Value:
        key = ("range", ids, axis)
        if key not in scope.made:
            low = self._binary(scope, "ge", ids, self._const(scope, 0, ids.dtype))
            high = self._emit(scope, t.InBounds, TEMPORARY, "bool", ids.axes, axis=axis, index=ids)
            scope.made[key] = self._binary(scope, "and", low, high, f"{ids.name}_valid")
        return scope.made[key]

    # -- reductions

    def _reduction(self, node: int, n: Node, home: Scope) -> t.Value:
        axis = n.attr("axis")
        if axis in self.looped:
            return self._loop_reductions(node, n, home)
        if n.op == "contract" and uses_dot(self.graph, self.schedule, node):
            return self._dot(n, home, home, None)
        value = self._reducible(n, home)
        kind = _kind(n)
        value = self._remask(home, value, axis, IDENTITY[kind, value.dtype])
        return self._reduce(node, home, kind, value, axis)

    def _reduce(self, node: int, scope: Scope, kind: str, value: t.Value, axis: str) -> t.Value:
        if axis not in value.axes:
            return value
        axes = tuple(a for a in value.axes if a != axis)
        hint = self.graph.names.get(node, f"{kind}_{identifier(axis)}")
        return self._emit(scope, t.Reduce, hint, value.dtype, axes, op=kind, value=value, axis=axis)

    def _reducible(self, n: Node, scope: Scope) -> t.Value:
        """What a reduction adds up: the operand, or the product of a contraction's operands in float32."""
        args = [self.value(a, scope) for a in n.args]
        if n.op == "reduce":
            return args[0]
        left, right = (self._f32(scope, a) for a in args)
        return self._binary(scope, "mul", left, right, "product")

    def _f32(self, scope: Scope, value: t.Value) -> t.Value:
        if value.dtype == "float32":
            return value
        out = self._emit(scope, t.Cast, f"{value.name}_f32", "float32", value.axes, value=value)
        self.zeroed[out.name] = self.zeroed.get(value.name, set())
        return out

    def _dot(self, n: Node, home: Scope, scope: Scope, acc: t.Value | None) -> t.Value:
        axis = n.attr("axis")
        left, right = (self._remask(scope, self.value(a, scope), axis, 0) for a in n.args)
        axes = self._tile_axes((set(left.axes) | set(right.axes)) - {axis})
        if axes[0] in right.axes:
            left, right = right, left
        return self._emit(scope, t.Dot, "acc", "float32", axes, left=left, right=right, axis=axis, acc=acc)

    def _loop_reductions(self, node: int, n: Node, home: Scope) -> t.Value:
        """Open one loop for this reduction and for all that are as deep, over the same axis and in the same scope."""
        axis = n.attr("axis")
        group = [m for m in self.graph.live() if self._shares_loop(m, node, axis) and m not in home.made]
        dots = {m: n.op == "contract" and uses_dot(self.graph, self.schedule, m) for m, n in self._nodes(group)}
        carries, inits = [], []
        for m, other in self._nodes(group):
            axes = self._tile_axes(other.axes if dots[m] else self._operand_axes(other))
            identity = IDENTITY[_kind(other), other.dtype]
            hint = self.graph.names.get(m, f"{_kind(other)}_{identifier(axis)}")
            inits.append(self._emit(home, t.Full, f"{hint}_init", other.dtype, axes, value=identity))
            carries.append(t.Value(self.names.fresh(f"{hint}_acc"), other.dtype, axes))

        def body(scope: Scope) -> list[t.Value]:
            yields = []
            for (m, other), carry in zip(self._nodes(group), carries, strict=True):
                if dots[m]:
                    yields.append(self._dot(other, home, scope, carry))
                else:
                    value = self._remask(scope, self._reducible(other, scope), axis, IDENTITY[_kind(other), other.dtype])
                    yields.append(self._binary(scope, COMBINE[_kind(other)], carry, value, carry.name))
            return yields

        outs = self._loop(home, axis, tuple(carries), tuple(inits), body)
        for m, out in zip(group, outs, strict=True):
            home.made[m] = self._reduce(m, home, _kind(self.graph.nodes[m]), out, axis)
        return home.made[node]

    def _shares_loop(self, other: int, node: int, axis: str) -> bool:
        a, b = self.graph.nodes[other], self.graph.nodes[node]
        if a.op not in ("reduce", "contract") or a.attr("axis") != axis or self.level[other] != self.level[node]:
            return False
        return self.looped & set(a.axes) == self.looped & set(b.axes)

    def _nodes(self, ids: list[int]) -> list[tuple[int, Node]]:
        return [(i, self.graph.nodes[i]) for i in ids]

    def _operand_axes(self, n: Node) -> set[str]:
        return {a for arg in n.args for a in self.graph.nodes[arg].axes}

    def _loop(self, home: Scope, axis: str, carries, inits, body: Callable[[Scope], list[t.Value]]) -> tuple[t.Value, ...]:
        """A loop over the blocks of `axis` (or over this program's part of them)."""
        block = self.blocks[axis]
        scope = Scope(home)
        var = start = t.Value(self.names.fresh(f"{identifier(axis)}_start"), "int32")
        stop = block.share if block.parts > 1 else self._extent(home, axis) if block.extent is None else block.extent
        if block.parts > 1:
            part = self._bound(home, part_axis(axis))[0]
            first = self._binary(home, "mul", part, self._const(home, block.share), f"{identifier(axis)}_first")
            start = self._binary(scope, "add", first, var, f"{identifier(axis)}_at")
        self._bind(scope, axis, block, start)
        yields = tuple(body(scope))
        outs = tuple(t.Value(self.names.fresh(c.name), c.dtype, c.axes) for c in carries)
        home.ops.append(t.Loop(var, stop, block.block, carries, inits, tuple(scope.ops), yields, outs))
        return outs

    def _extent(self, scope: Scope, axis: str) -> t.Value:
        key = ("extent", axis)
        if key not in self.root.made:
            if (size := {**self.blocks, **self.gathered}.get(axis, t.AxisBlock(axis, None, 1, "gather")).extent) is not None:
                return self._const(scope, size)
            self.root.made[key] = self._emit(self.root, t.Extent, f"{identifier(axis)}_size", "int32", (), axis=axis)
        return self.root.made[key]

    # -- top-k

    def _top_k(self, node: int, n: Node, home: Scope) -> t.Value:
        """k steps of: find the best key, keep it, strike it out. A 16-bit key carries its index in its low half."""
        axis, into, packed = n.attr("axis"), n.attr("into"), n.attr("bits") == 16
        keys = self.value(n.args[0], home)
        index, lowest = self._bound(home, axis)[0], IDENTITY["max", "int32"]
        if packed:
            inverted = self._binary(home, "sub", self._const(home, 0xFFFF), index)
            high = self._binary(home, "shl", keys, self._const(home, 16))
            keys = self._binary(home, "or", high, inverted, "packed")
        keys = self._remask(home, keys, axis, lowest)
        into_axes = self._tile_axes((set(self.graph.nodes[n.args[0]].axes) - {axis}) | {into})
        inits = [keys, self._emit(home, t.Full, "best_init", "int32", into_axes, value=0)]
        if not packed:
            inits.append(self._emit(home, t.Full, "ids_init", "int32", into_axes, value=0))
        carries = tuple(t.Value(self.names.fresh(c), "int32", i.axes) for c, i in zip(("keys", "best", "ids"), inits, strict=False))
        var, scope = t.Value(self.names.fresh("rank"), "int32"), Scope(home)
        step = self._packed_step if packed else self._plain_step
        yields = step(scope, var, carries, axis, into)
        outs = tuple(t.Value(self.names.fresh(c.name), c.dtype, c.axes) for c in carries)
        home.ops.append(t.Loop(var, n.attr("k"), 1, carries, tuple(inits), tuple(scope.ops), yields, outs))
        best, ids = outs[1], outs[-1]
        if packed:
            low = self._binary(home, "and", best, self._const(home, 0xFFFF))
            ids = self._binary(home, "sub", self._const(home, 0xFFFF), low, "ids")
            best = self._binary(home, "shr", best, self._const(home, 16), "best")
        for other, m in self._nodes(self.graph.live()):
            if m.op == "top_k" and m.args == n.args and m.attrs[:-1] == n.attrs[:-1]:
                home.made[other] = best if m.attr("part") == "keys" else ids
        return home.made[node]

    def _packed_step(self, scope: Scope, rank: t.Value, carries, axis: str, into: str) -> tuple[t.Value, ...]:
        keys, best = carries
        top = self._reduce(-1, scope, "max", keys, axis)
        here = self._binary(scope, "eq", self._bound(scope, into)[0], rank)
        struck = self._where(
            scope, self._binary(scope, "eq", keys, top), self._const(scope, IDENTITY["max", "int32"]), keys, "keys"
        )
        return struck, self._where(scope, here, top, best, "best")

    def _plain_step(self, scope: Scope, rank: t.Value, carries, axis: str, into: str) -> tuple[t.Value, ...]:
        keys, best, ids = carries
        index, mask = self._bound(scope, axis)
        top = self._reduce(-1, scope, "max", keys, axis)
        hit = self._all(scope, (self._binary(scope, "eq", keys, top), mask))
        found = self._where(scope, hit, index, self._const(scope, IDENTITY["min", "int32"]), "found")
        first = self._reduce(-1, scope, "min", found, axis)
        here = self._binary(scope, "eq", self._bound(scope, into)[0], rank)
        struck = self._where(
            scope, self._binary(scope, "eq", index, first), self._const(scope, IDENTITY["max", "int32"]), keys, "keys"
        )
        return struck, self._where(scope, here, top, best, "best"), self._where(scope, here, first, ids, "ids")

    # -- outputs

    def _stores(self) -> None:
        """Everything is computed first; then outputs along looped axes are stored loop by loop, then the others."""
        groups: dict[tuple[str, ...], list[Write]] = {}
        for w in self.graph.writes:
            groups.setdefault(tuple(a for a in self.blocks if a in self.looped & reach(self.graph, w)), []).append(w)
            for node in (w.value, *w.ids):
                self._prefetch(node, set())
        for axes in sorted(groups, key=len, reverse=True):
            self._store_group(self.root, axes, groups[axes])

    def _prefetch(self, node: int, seen: set[int]) -> None:
        if node in seen:
            return
        seen.add(node)
        n = self.graph.nodes[node]
        if not self.looped & set(n.axes):
            self.value(node, self.root)
        else:
            for arg in n.args:
                self._prefetch(arg, seen)

    def _store_group(self, scope: Scope, axes: tuple[str, ...], writes: list[Write]) -> None:
        if not axes:
            stores = []
            for w in writes:
                value = self.value(w.value, scope)
                index, wide, mask = self._address(w.tensor, w.index, w.ids, scope)
                stores.append(t.Store(w.tensor, index, wide, value, mask))
            scope.ops.extend(stores)
            return

        def body(inner: Scope) -> list[t.Value]:
            self._store_group(inner, axes[1:], writes)
            return []

        self._loop(scope, axes[0], (), (), body)


def _elementwise(kind, field_names: tuple[str, ...], op: bool = True):
    """A rule for an element-wise node: one tile operation with the node's operands."""

    def rule(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
        axes = low._tile_axes(n.axes)
        fields = dict(zip(field_names, args, strict=True)) | ({"op": n.op} if op else {})
        out = low._emit(scope, kind, name or TEMPORARY, n.dtype, axes, **fields)
        if kind is t.Cast and n.dtype != "bool":
            low.zeroed[out.name] = low.zeroed.get(args[0].name, set())
        return out

    return rule


def _iota(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low._along(scope, n.attr("index"))


def _constant(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low._const(scope, n.attr("value"), n.dtype)


def _extent(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    return low._extent(scope, n.attr("axis"))


def _cumsum(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    if n.attr("axis") not in args[0].axes:
        return args[0]
    return low._emit(scope, t.Scan, name or "running", n.dtype, args[0].axes, value=args[0], axis=n.attr("axis"))


def _softplus(low: Lowering, n: Node, scope: Scope, args: list[t.Value], name: str | None) -> t.Value:
    """max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = log(u)·e/(u - 1) for u = 1 + e (Kahan)."""
    x, one, zero = args[0], low._const(scope, 1.0, "float32"), low._const(scope, 0.0, "float32")

    def unary(op: str, v: t.Value) -> t.Value:
        return low._emit(scope, t.Unary, TEMPORARY, "float32", v.axes, op=op, value=v)

    e = unary("exp", unary("neg", unary("abs", x)))
    u = low._binary(scope, "add", e, one)
    tiny = low._binary(scope, "eq", u, one)
    below = low._where(scope, tiny, one, low._binary(scope, "sub", u, one))
    ratio = low._binary(scope, "div", low._binary(scope, "mul", unary("log", u), e), below)
    log1p = low._where(scope, tiny, e, ratio)
    return low._binary(scope, "add", low._binary(scope, "maximum", x, zero), log1p, name or TEMPORARY)


def _rules() -> dict:
    from moekit.lang.graph import BINARY, UNARY

    rules = {op: _elementwise(t.Unary, ("value",)) for op in UNARY if op != "softplus"}
    rules["softplus"] = _softplus
    rules |= {op: _elementwise(t.Binary, ("left", "right")) for op in BINARY}
    return rules | {
        "where": _elementwise(t.Where, ("condition", "yes", "no"), op=False),
        "cast": _elementwise(t.Cast, ("value",), op=False),
        "bitcast": _elementwise(t.Bitcast, ("value",), op=False),
        "iota": _iota,
        "const": _constant,
        "extent": _extent,
        "cumsum": _cumsum,
    }


RULES = _rules()


def part_axis(axis: str) -> str:
    """The name of the grid axis that counts the parts of a split axis."""
    return f"{axis}.part"


def _kind(n: Node) -> str:
    return "sum" if n.op == "contract" else n.attr("kind")


def _memory_ops(ops):
    for op in ops:
        if isinstance(op, t.Loop):
            yield from _memory_ops(op.body)
        elif isinstance(op, t.Load | t.Store):
            yield op


def lower(
    graph: Graph,
    schedule: Schedule,
    layouts: Mapping[str, t.Strided | t.Viewed],
    sizes: Mapping[str, int] | None = None,
    digest: str = "",
) -> t.TileProgram:
    """The tile program of `graph` under a legal `schedule`; `sizes` fixes dynamic axes where they are known (JAX)."""
    return Lowering(graph, schedule, layouts, sizes or {}).run(digest)
