"""The mutants: each one mistake that a person, or a refactoring, could make in the lowering or an emitter."""

# ruff: noqa: E501  (rows quote lines of the sources as they stand)
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mistake: in `file` (under moekit/) every text of `edits` is replaced by the other one.

    `proof`: one sentence saying why it changes no result, for one that is none; it is not counted.
    """

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    about: str
    proof: str = ""


def _one(name: str, file: str, old: str, new: str, about: str, proof: str = "") -> Mutant:
    return Mutant(name, file, ((old, new),), about, proof)


HISTORICAL = (
    _one("row-stride-ignored", "backends/triton.py", "terms.append(index if kind == \"unit\" else f\"{index} * {stride(op.tensor, axis or '')}\")",
         "dense = len(terms) == 1 and param.axes[-1] is not None and param.axes[-1] != axis\n"
         "            row = extent_text(self.program, param.axes[-1]) if dense else stride(op.tensor, axis or '')\n"
         "            terms.append(index if kind == \"unit\" else f\"{index} * {row}\")",
         "logits [M, 60] with stride 64 read as if rows were dense (vLLM 57823, FlashInfer 4713)"),
    _one("stored-then-reloaded", "compile/lower.py", "            for node in (w.value, *w.ids):\n                self._prefetch(node, set())\n",
         "            if w.tensor in {t.name for t in self.graph.tensors.values() if t.role == 'InOut'}:\n"
         "                self._store_group(self.root, tuple(a for a in self.blocks if a in self.looped & {getattr(i, 'axis', None) for i in w.index}), (w,))\n"
         "            for node in (w.value, *w.ids):\n                self._prefetch(node, set())\n",
         "a value stored and loaded again by the same program with nothing between (LightLLM's top-k)"),
    _one("nan-is-padding", "lang/ops.py", "where(isnan(x), LOWEST + 2 ** (32 - width),",
         "where(isnan(x), LOWEST,",
         "rows of NaN choose one expert k times (vLLM 39244) or ids out of range (SGLang 30079)"),
    _one("offsets-32-bit", "compile/lower.py", "wide.append(isinstance(layout, t.Strided) and (everywhere or dynamic))", "wide.append(False)",
         "int32 offsets past 2^31 (Liger 1248 and 1296, megablocks 186, vLLM 42173)"),
    _one("experts-past-256", "compile/topk.py", "    others = set(",
         "    near = low.binary(home, 'lt', index, low.const(home, 256))\n"
         "    keys = low.where(home, near, keys, low.const(home, lowest), 'keys')\n"
         "    others = set(",
         "more than 256 experts ignored (SGLang 23609's neighbours)"),
)  # fmt: skip

LOWERING = (
    _one("no-mask-dynamic", "compile/tile/program.py", "        return self.extent is None or self.extent %", "        return self.extent is not None and self.extent %",
         "tokens past the last are loaded and stored"),
    _one("no-mask-whole", "compile/tile/program.py", "            return self.extent != self.block", "            return False", "a block of 64 over 37 columns has no mask"),
    _one("no-mask-looped", "compile/scope.py", "        if block.partial:", '        if block.partial and block.mode != "loop":', "the last turn of a loop has no mask"),
    _one("start-off", "compile/scope.py", "self.const(scope, block.block), f\"{identifier(axis)}_start\"",
         "self.const(scope, max(1, block.block - 1)), f\"{identifier(axis)}_start\"", "programs overlap by one element each"),
    _one("no-remask", "compile/scope.py", "        if mask is None or (identity == 0", "        if True or (identity == 0", "reductions add up what lies past the end"),
    _one("zero-for-any-identity", "compile/scope.py", "(identity == 0 and axis in self.zeroed.get(value.name, ()))", "(axis in self.zeroed.get(value.name, ()))",
         "the zeros of masked lanes take part in max and min"),
    _one("one-mask-of-two", "compile/scope.py", "        if len(masks) < 2:\n            return masks[0] if masks else None",
         "        if True:\n            return masks[0] if masks else None", "of two ragged axes only the first is masked"),
    _one("last-block-dropped", "compile/scope.py", "home.ops.append(t.Loop(var, stop, block.block,",
         "home.ops.append(t.Loop(var, stop - stop % block.block if isinstance(stop, int) else stop, block.block,", "a loop leaves out its ragged last block"),
    _one("parts-start-wrong", "compile/scope.py", "self.const(home, self.blocks[axis].share)", "self.const(home, self.blocks[axis].block)", "the parts of a split axis begin too early"),
    _one("share-rounds-down", "compile/tile/program.py", "return -(-self.blocks // self.parts) * self.block", "return max(1, self.blocks // self.parts) * self.block", "the parts of a split axis do not reach its end"),
    _one("slice-start-ignored", "compile/lower.py", "            if entry.start:\n", "            if False:\n", "the second half is the first"),
    _one("slice-step-ignored", "compile/lower.py", "            if entry.step != 1:\n", "            if False:\n", "interleaved slices are read side by side"),
    _one("ids-unchecked", "compile/lower.py", "                masks.append(self._in_range(scope, ids, dim.axis))\n", "", "ids out of range reach memory"),
    _one("id-zero-invalid", "compile/lower.py", 'low = self.binary(scope, "ge", ids', 'low = self.binary(scope, "gt", ids', "id 0 is taken for padding"),
    _one("store-unmasked", "compile/lower.py", "t.Store(w.tensor, index, wide, value, mask)", "t.Store(w.tensor, index, wide, value, None)", "stores past the end"),
    _one("load-unmasked", "compile/lower.py", "            wide=wide,\n            mask=mask,\n", "            wide=wide,\n            mask=None,\n", "loads past the end"),
    _one("second-output-lost", "compile/lower.py", "            scope.ops.extend(stores)", "            scope.ops.extend(stores[:1])", "only the first of several outputs is stored"),
    _one("indices-swapped", "compile/lower.py", "        return tuple(values), tuple(wide), self.all(scope, masks)",
         "        return tuple(values[::-1]), tuple(wide), self.all(scope, masks)", "rows for columns"),
    _one("max-from-zero", "compile/reductions.py", '("max", "float32"): float("-inf")', '("max", "float32"): 0.0', "the maximum of negative numbers is zero"),
    _one("min-from-zero", "compile/reductions.py", '("min", "float32"): float("inf")', '("min", "float32"): 0.0', "the minimum of positive numbers is zero"),
    _one("min-int-from-zero", "compile/reductions.py", '("min", "int32"): 2**31 - 1', '("min", "int32"): 0', "the first index is always 0"),
    _one("product-unwidened", "compile/reductions.py", "    left, right = (_f32(low, scope, a) for a in args)", "    left, right = args", "products are rounded to the operands' dtype"),
    _one("whole-not-remasked", "compile/reductions.py", "    value = low.remask(home, value, axis, IDENTITY[kind, value.dtype])\n", "", "a reduction of a whole block is not masked"),
    _one("loop-not-remasked", "compile/reductions.py", "value = low.remask(scope, _reducible(low, n, scope), axis, IDENTITY[_kind(n), n.dtype])",
         "value = _reducible(low, n, scope)", "the last block of a looped reduction is not masked"),
    _one("dot-not-remasked", "compile/reductions.py", "(low.remask(scope, v, axis, 0) for v in operands)", "operands",
         "the matrix unit multiplies what lies past the end"),
    _one("accumulator-from-zero", "compile/reductions.py", "_operand_axes(low, n))\n        inits.append(low.emit(home, t.Full, f\"{hint}_init\", n.dtype, axes, value=IDENTITY[_kind(n), n.dtype]))",
         "_operand_axes(low, n))\n        inits.append(low.emit(home, t.Full, f\"{hint}_init\", n.dtype, axes, value=0))", "a looped maximum begins at zero"),
    _one("last-block-only", "compile/reductions.py", "yields.append(low.binary(scope, COMBINE[_kind(n)], carry, value, carry.name))", "yields.append(value)", "a looped reduction forgets all but its last block"),
    _one("dot-forgets", "compile/reductions.py", "for a in n.args], scope, carry))", "for a in n.args], scope, None))", "a looped product forgets all but its last block"),
    _one("max-becomes-min", "compile/reductions.py", '"max": "maximum"', '"max": "minimum"', "looped maxima are combined by minimum"),
    _one("dot-operands-kept", "compile/reductions.py", "    if axes[0] in right.axes:\n        left, right = right, left\n", "", "the rows of a product are its columns"),
    _one("accumulator-bfloat16", "compile/reductions.py", "                yields.append(low.binary(scope, COMBINE[_kind(n)], carry, value, carry.name))",
         "                kept = low.binary(scope, COMBINE[_kind(n)], carry, value, carry.name)\n"
         "                if kept.dtype == 'float32':\n"
         "                    kept = low.emit(scope, t.Cast, 'narrow', 'bfloat16', kept.axes, value=kept)\n"
         "                    kept = low.emit(scope, t.Cast, 'wide', 'float32', kept.axes, value=kept)\n"
         "                yields.append(kept)", "sums are kept in bfloat16"),
    Mutant("ties-to-the-higher", "compile/topk.py", (
        ('inverted = low.binary(home, "sub", low.const(home, 0xFFFF), index)', 'inverted = low.binary(home, "add", low.const(home, 0), index)'),
        ('ids = low.binary(home, "sub", low.const(home, 0xFFFF), inverted, "ids")', 'ids = low.binary(home, "add", low.const(home, 0), inverted, "ids")')),
        "16-bit ties go to the higher index"),
    _one("ties-struck-together", "compile/topk.py", 'low.binary(scope, "eq", index, first)', 'low.binary(scope, "eq", keys, top)', "of several equal keys only one is ever chosen"),
    Mutant("topk-not-remasked", "compile/topk.py", (
        ("        keys = low.remask(home, keys, axis, lowest)\n", "        pass\n"),
        ('above = low.remask(scope, low.binary(scope, "sub", keys, base, "above"), axis, lowest)', 'above = low.binary(scope, "sub", keys, base, "above")')),
        "padding columns compete for the top k"),
    _one("ranks-smeared", "compile/topk.py", "here = low.binary(scope, \"eq\", low.bound(scope, into)[0], var)", "here = low.binary(scope, \"le\", low.bound(scope, into)[0], var)", "the k-th best everywhere"),
    _one("series-cut-short", "compile/elementwise.py", "SERIES = (15, 13, 11, 9, 7, 5, 3, 1)", "SERIES = (5, 3, 1)", "softplus's series is cut short"),
    _one("softplus-min", "compile/elementwise.py", 'low.binary(scope, "maximum", x, zero)', 'low.binary(scope, "minimum", x, zero)', "softplus of the wrong side"),
    _one("where-swapped", "compile/elementwise.py", '_elementwise(t.Where, ("condition", "yes", "no"), op=False)', '_elementwise(t.Where, ("condition", "no", "yes"), op=False)', "where takes the other branch"),
    _one("operands-swapped", "compile/elementwise.py", '_elementwise(t.Binary, ("left", "right"))', '_elementwise(t.Binary, ("right", "left"))', "a - b is b - a"),
    _one("rounding-dropped", "compile/lower.py", "        if n.op in RULES:\n",
         "        if n.op == 'cast' and n.dtype in ('float16', 'bfloat16') and any(node in m.args for m in self.graph.nodes):\n"
         "            return self.value(n.args[0], home)\n        if n.op in RULES:\n", "a declared rounding inside the declaration is left out"),
    _one("parts-added", "compile/schedule/cuts.py", 'kind = "sum" if node.op == "contract" else dict(node.attrs).get("kind")', 'kind = "sum"', "the parts of a split maximum are added"),
    _one("written-over", "compile/alias.py", "return all((n.attr(\"index\"), n.args) == (write.index, write.ids) for n in reads)", "return True", "an output may replace an operand that is still read elsewhere"),
    _one("parts-forgotten", "compile/reductions.py", "return [low.binary(scope, COMBINE[_kind(_node(low, u))], total, value, total.name) for u, total, value in done]", "return [value for u, total, value in done]", "of the parts done in a row only the last counts"),
    _one("section-unsplit", "compile/schedule/facts.py", "return {a.removesuffix(PART): use.extent or 1 for", "return {a.removesuffix(PART): 1 for", "every part of a split adds up all of the axis"),
    _one("grid-rounds-down", "compile/tile/program.py", "count *= -(-extent // a.block)", "count *= max(1, extent // a.block)", "the last tokens have no program"),
    _one("range-key-lost", "compile/lower.py", 'key = ("range", ids, axis)', 'key = ("range", ids)', "ids are checked once for two tables of other sizes"),
    _one("updated-first", "compile/stores.py", "free = next((s for s in left if not any(o.loads & set(s.tensors) for o in left if o is not s)), None)", "free = next(reversed(left), None)", "what overwrites an operand is stored before what loads it again"),
    _one("values-when-stored", "compile/lower.py", "        for w in self.graph.writes:\n            for node in (w.value, *w.ids):\n                self._prefetch(node, set())\n", "", "values are made when they are stored, after other stores"),
    _one("loads-before-ids", "compile/early.py", "isinstance(op, FREE) and {v.name for v in t.operands(op)} <= known", "isinstance(op, FREE)", "a load comes before the reduction that says where from"),
    _one("parts-unmasked", "compile/tile/program.py", "self.extent % (self.block * self.parts) != 0", "self.extent % self.block != 0", "the last part of an axis that the parts do not divide has no mask"),
    _one("last-part-dropped", "compile/scope.py", "parts, ops = self.blocks[axis].parts, tuple", "parts, ops = self.blocks[axis].parts - 1, tuple", "of the parts done in a row the last is left out"),
    _one("loops-confused", "compile/scope.py", "for s in reversed(scope.chain()) if axis in s.bound", "for s in scope.chain() if axis in s.bound", "within two loops over an axis the outer one's index is taken"),
    _one("dot-right-bare", "compile/reductions.py", "    left, right = (low.remask(scope, v, axis, 0) for v in operands)\n", "    left, right = operands\n    left = low.remask(scope, left, axis, 0)\n", "of a product's operands only the first is masked"),
    Mutant("sections-race", "compile/rules/sections.py", (
        ("    if _written(one) & read(other) or _written(other) & read(one):\n        return True\n", ""),
    ), "one section overwrites what another of the launch reads"),
    _one("twins-alike", "compile/twins.py", "values=(i.start, j.start))", "values=(i.start, i.start))", "of two products made as one both have the first one's columns"),
    _one("twins-unmasked", "compile/twins.py", "if low.blocks[twins.column].partial:", "if False:", "of two products made as one the last block of columns has no mask"),
    _one("scratch-bfloat16", "compile/schedule/cuts.py", 'scratch[i] = Scratch(name, node.dtype,', 'scratch[i] = Scratch(name, "bfloat16" if node.dtype == "float32" else node.dtype,', "partial results are kept in bfloat16"),
    _one("overlap-in-the-last-row", "compile/overlap.py", "sum((n - 1) * s for n", "sum((n - 2) * s for n", "an output may overlap the last row of an operand"),
    _one("overlap-of-halves", "compile/overlap.py", "    ranges[1][0] -= b[2] - 1\n    ranges[1][1] += a[2] - 1\n", "    ranges[1][0] -= 0\n", "an output may lie in the halves of an operand's elements"),
    _one("overlap-by-range", "compile/overlap.py", "    return _shared(a.start", "    return True or _shared(a.start", "tensors that take turns in one array are refused"),
    _one('zero-after-any-function', 'compile/elementwise.py', 'if kind is t.Cast and n.dtype != "bool":', 'if kind in (t.Cast, t.Unary) and n.dtype != "bool":', 'where nothing was loaded every function of it is taken for zero'),
    _one('series-coefficient', 'compile/elementwise.py', '(15, 13, 11, 9, 7, 5, 3, 1)', '(15, 13, 11, 8, 7, 5, 3, 1)', "one coefficient of softplus's series is wrong"),
    Mutant('ties-of-32-bits-to-the-higher', 'compile/topk.py', (
        ('low.const(scope, IDENTITY["min", "int32"]), "found")', 'low.const(scope, IDENTITY["max", "int32"]), "found")'),
        ('reduce(low, -1, scope, "min", found, axis)', 'reduce(low, -1, scope, "max", found, axis)')), 'ties of float32 go to the higher index'),
    _one('zeros-of-one-sign', 'compile/scope.py', 'key = ("const", repr(value), dtype)', 'key = ("const", value, dtype)', 'constants 0.0 and -0.0 are one'),
    _one('ids-past-the-end', 'compile/lower.py', 'self.binary(scope, "and", low, high, f"{ids.name}_valid")', 'self.binary(scope, "and", low, low, f"{ids.name}_valid")', 'ids are checked at zero only'),
    _one('ids-32-bit', 'compile/lower.py', '                masks.append(self._in_range(scope, ids, dim.axis))\n                dynamic = self.graph.axes[dim.axis] is None', '                masks.append(self._in_range(scope, ids, dim.axis))\n                dynamic = False', 'offsets of rows chosen by ids are computed in 32 bits'),
    _one('ids-narrowed', 'compile/lower.py', '                ids = self.value(args[entry.operand], scope)\n', '                ids = self.value(args[entry.operand], scope)\n                if ids.dtype == "int64":\n                    ids = self.emit(scope, t.Cast, "narrow", "int32", ids.axes, value=ids)\n', 'ids of 64 bits are cut to 32 before they are checked'),
    _one('start-times-step', 'compile/lower.py', '            if entry.step != 1:\n                index = self.binary(home, "mul", index, self.const(home, entry.step), index.name)\n            if entry.start:\n                index = self.binary(home, "add", index, self.const(home, entry.start), index.name)\n', '            if entry.start:\n                index = self.binary(home, "add", index, self.const(home, entry.start), index.name)\n            if entry.step != 1:\n                index = self.binary(home, "mul", index, self.const(home, entry.step), index.name)\n', "a slice's start is multiplied by its step"),
    _one('second-block-lost', 'compile/scope.py', 'block.extent > block.block)', 'block.extent >= 2 * block.block)', 'an axis of less than two blocks has no program for the second'),
    _one('loops-shared-across', 'compile/reductions.py', '    return low.looped & set(a.axes) == low.looped & set(b.axes)', '    return True', 'reductions in other loops share one'),
    _one('scratch-confused', 'compile/schedule/cuts.py', 's = scratch[i]', 's = next(iter(scratch.values()))', "every sum of parts reads the first one's parts"),
    _one('parallel-if-any', 'compile/schedule/facts.py', 'everywhere = set.intersection(*spreads)', 'everywhere = set.union(*spreads)', 'an axis that some output lacks is cut into programs'),
    _one('over-what-others-read', 'compile/alias.py', '(n.attr("index"), n.args) == (write.index, write.ids)', 'n.args == write.ids', 'an output may replace an operand of which it reads other elements'),
    _one('twins-step-lost', 'compile/twins.py', '        if i.step != 1:\n', '        if False:\n', 'of two products made as one every column is taken for every second'),
    _one('twins-of-other-steps', 'compile/schedule/facts.py', '(i.axis, i.step) == (j.axis, j.step)', 'i.axis == j.axis', 'products of side by side and of interleaved columns are made as one'),
    _one('twins-of-two-tensors', 'compile/schedule/facts.py', ' or one.attr("tensor") != other.attr("tensor")', '', 'products with columns of two weights are made as one'),
    _one('parts-for-few-rows-only', 'compile/rules/choose.py', 'columns, in_a_row=split)', 'columns, in_a_row=None)', "with many rows a sum is not made in parts: a row's bits depend on T"),
    _one('tile-decides-a-sum', 'compile/rules/gemm.py', '    every = [*sections(graph), *(g for', '    return False\n    every = [*sections(graph), *(g for', "a sum beside a product goes by its tile: a row's bits depend on T"),
    _one('max-int64-from-zero', 'compile/reductions.py', '("max", "int64"): -(2**63)', '("max", "int64"): 0', 'the maximum of negative numbers of 64 bits is zero'),
    _one('min-int64-narrow', 'compile/reductions.py', '("min", "int64"): 2**63 - 1', '("min", "int64"): 2**31 - 1', 'the minimum of numbers past 2^31 is 2^31'),
    _one('overlap-of-equal-strides', 'compile/overlap.py', 'doubled |= s in ranges', 'doubled |= False', 'a tensor of two equal strides is taken for one that does not meet itself'),
    _one('neg-from-zero', 'compile/elementwise.py', '    if not is_float(n.dtype):\n', '    if True:\n', '-x is 0 - x in Triton, which loses the sign of zero'),
)  # fmt: skip

PRINTER = (
    _one("program-id-undecoded", "backends/printer.py", "return rem.format(text, count(axis)) if at > 0 else text", "return text", "an inner grid axis is not taken modulo its blocks"),
    _one("store-axes-turned", "backends/printer.py", "        return tuple(a.name for a in self.program.axes if a.name in axes)",
         "        return tuple(a.name for a in reversed(self.program.axes) if a.name in axes)", "a store takes its axes in another order than its value has"),
)  # fmt: skip

TRITON = (
    _one("triton-section-offset", "backends/triton.py", "{section.name}(pid{f' - {begin}' if i else ''}, {call})", "{section.name}(pid, {call})", "a later section's programs are numbered from the launch's first"),
    _one("triton-mask-le", "backends/triton.py", "} < {extent_text(p.program, op.axis)})", "} <= {extent_text(p.program, op.axis)})", "one element past the end"),
    _one("triton-abreast-offset", "backends/triton.py", '(f" - {low}" if low else "")', '""', "programs that take turns are numbered from another section's first"),
    _one("triton-flat-keeps", "backends/triton.py", "        lines += [f\"{pad}        {line}\" for line in first]\n", "", "a loop printed as one with the one in it does not begin its sum anew in each part"),
    _one("triton-flat-early", "backends/triton.py", "if turn % {turns} == {turns - 1}:", "if turn % {turns} == {turns - 2}:", "a loop printed as one with the one in it ends each part a turn early"),
    _one("triton-half-turned", "backends/triton.py", "{(*places, at)}))[{op.side}]", "{(*places, at)}))[{1 - op.side}]", "of two products made as one each gets the other's half"),
    _one("triton-unit-lost", "backends/triton.py", "= {a.name} * {a.unit}\"", "= {a.name}\"", "strides in units of 16 bytes taken for elements"),
    _one("triton-32-bit", "backends/triton.py", "            if wide:\n", "            if False:\n", "the 64-bit product is printed in 32 bits"),
    _one("triton-store-mask", "backends/triton.py", 'mask = f", mask={self.at(op.mask, axes)}" if op.mask is not None else ""', 'mask = ""', "stores are not masked"),
    _one("triton-load-mask", "backends/triton.py", 'mask = f", mask={p.at(op.mask, axes)}, other={number(op.fill)}" if op.mask is not None else ""', 'mask = ""', "loads are not masked"),
    _one("triton-load-fill", "backends/triton.py", "other={number(op.fill)}\"", "other=1\"", "masked lanes read as one"),
    _one("triton-dot-forgets", "backends/triton.py", '    acc = f", {p.text(op.acc)}" if op.acc is not None else ""\n', '    acc = ""\n', "tl.dot without its accumulator"),
    _one("triton-cast-lost", "backends/triton.py", 't.Cast: lambda p, op: f"', 't.Cast: lambda p, op: p.text(op.value) if op.out.dtype == "float16" else f"',
         "narrowing casts are not printed"),
    _one("triton-bitcast-converts", "backends/triton.py", ", bitcast=True)", ")", "bits are converted instead of read"),
    _one("triton-loop-short", "backends/triton.py", "in range(0, {stop}, {op.step}):", "in range(0, {stop} - {op.step} + 1, {op.step}):", "a loop leaves out its ragged last block"),
    _one("triton-grid-mixed", "backends/triton.py", '"({} // {})", "{} % {}"', '"({} % {})", "{} // {}"', "division for remainder in the program id"),
    _one("triton-reduce-other", "backends/triton.py", '    return f"tl.{op.op}({p.arg(op.value)}, axis={axis})"', '    return f"tl.max({p.arg(op.value)}, axis={axis})"', "every reduction is a maximum"),
    _one("triton-scan-reversed", "backends/triton.py", "axis={op.value.axes.index(op.axis)})\"", "axis={op.value.axes.index(op.axis)}, reverse=True)\"", "running sums from the other end"),
    _one("triton-bfloat16-lost", "backends/triton.py", 't.Cast: lambda p, op: f"', 't.Cast: lambda p, op: p.text(op.value) if op.out.dtype == "bfloat16" else f"', "casts to bfloat16 are not printed"),
    _one("triton-tf32", "backends/triton.py", ', input_precision="ieee")', ")", "float32 operands of a product are rounded to TF32"),
    _one("triton-nan-dropped", "backends/triton.py", "return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)", "return tl.maximum(a, b)", "the maximum of a row with NaN is a number"),
    _one("triton-part-dropped", "backends/triton.py", "tl.static_range(0, {stop}, {op.step})", "tl.static_range(0, {stop} - 1, {op.step})", "a loop that is written out leaves out the last part"),
    _one("triton-section-starts-late", "backends/triton.py", "(pid >= {begin}) & (pid < {end})", "(pid > {begin}) & (pid < {end})", "the first program of a later section does nothing"),
    _one('triton-lt-le', 'backends/triton.py', '"lt": "({a} < {b})"', '"lt": "({a} <= {b})"', 'less than is at most'),
    _one('triton-le-lt', 'backends/triton.py', '"le": "({a} <= {b})"', '"le": "({a} < {b})"', 'at most is less than'),
    _one('triton-remainder-floors', 'backends/triton.py', '"rem": "({a} % {b})"', '"rem": "(({a} % {b}) + {b}) % {b}"', 'remainders of negative numbers are positive'),
    _one('triton-maximum-nan', 'backends/triton.py', 'nan = ", propagate_nan=tl.PropagateNan.ALL" if is_float(op.left.dtype) else ""', 'nan = ""', 'the larger of a number and NaN is the number'),
    Mutant('triton-half-interleaved', 'backends/triton.py', (
        ('shape += [2, n // 2] if a == op.axis else [n]', 'shape += [n // 2, 2] if a == op.axis else [n]'),
        ('at, of = op.value.axes.index(op.axis), p.program.axis(op.axis).of', 'at, of = op.value.axes.index(op.axis) + 1, p.program.axis(op.axis).of')), 'of two products made as one every second column is one'),
    _one('triton-twice-divided', 'backends/triton.py', 'tl.arange(0, {2 * block}) % {block}"', 'tl.arange(0, {2 * block}) // {block}"', 'of two products made as one the columns are counted by division'),
    _one('triton-wide-late', 'backends/triton.py', '                index = f"{index}.to(tl.int64)" if v.name not in self.inline or "[" in index else f"tl.cast({index}, tl.int64)"\n', '                late = kind != "unit" and not (v.axes and axis in single)\n                index = f"({index} * {stride(op.tensor, axis or \'\')}).to(tl.int64)" if late and v.axes else f"tl.cast({index}, tl.int64)"\n                if late and v.axes:\n                    terms.append(index)\n                    continue\n', 'an offset is widened after it is computed'),
    _one('triton-blocks-floor', 'backends/triton.py', 'f"tl.cdiv({extent}, {block})" if block > 1', 'f"({extent} // {block})" if block > 1', 'the blocks of an axis are counted without the last ragged one'),
    _one('triton-negative-zero-lost', 'backends/triton.py', 'if isinstance(op.value, float) and op.value == 0 and copysign(1, op.value) < 0:', 'if False:', 'a literal -0.0 is 0.0'),
)  # fmt: skip

TORCH = (
    _one('aligned-to-8', 'compile/dense.py', 'stride * size % 16 == 0 and', 'stride * size % 8 == 0 and', 'strides of a multiple of 8 bytes are counted in units of 16'),
    _one('reach-of-2-31', 'compile/dense.py', 'wide=reach >= 2**31', 'wide=reach > 2**31', 'an offset of exactly 2^31 is computed in 32 bits'),
    _one('written-one-by-one', 'torch/call.py', 'ready = {n: _apart(values[n] if n in self.outs else values[n].contiguous(), held) for n in self.names}', 'ready = {n: values[n] if n in self.outs else values[n].contiguous() for n in self.names}', 'an output goes over the operand that another output is, before that is copied'),
    _one('outputs-overlap', 'torch/call.py', '                if m != n and overlap(r, s):\n', '                if m != n and r == s:\n', 'two outputs may overlap each other'),
    _one('own-operand-overlaps', 'torch/call.py', 'not (m == n and r == s)', 'not m == n', 'an update may overlap its own operand, shifted'),
)  # fmt: skip

PALLAS = (
    _one("pallas-section-offset", "backends/pallas.py", "[f'pid - {begin}', *_refs(section)]", "['pid', *_refs(section)]", "a later section's programs are numbered from the launch's first"),
    _one("pallas-mask-le", "backends/pallas.py", "} < {extent_text(p.program, op.axis)})", "} <= {extent_text(p.program, op.axis)})", "one element past the end"),
    _one("pallas-start-lost", "backends/pallas.py", 'texts[axis] = f"{text} + {start}" if start else text', "texts[axis] = text", "a View's start is ignored"),
    _one("pallas-step-lost", "backends/pallas.py", 'text = f"{text} * {step}" if step != 1 else text', "text = text", "a View's step is ignored"),
    _one("pallas-axes-reversed", "backends/pallas.py", "for axis in range(len(layout.base)))", "for axis in reversed(range(len(layout.base))))", "a View's axes in the wrong order"),
    _one("pallas-store-mask", "backends/pallas.py", 'mask = f", mask={self.block(op.mask, axes)}" if op.mask is not None else ""', 'mask = ""', "stores are not masked"),
    _one("pallas-load-fill", "backends/pallas.py", "other={fill}", "other=1", "masked lanes read as one"),
    _one("pallas-abreast-offset", "backends/pallas.py", "{turn} * {count} + {at} - {low}", "{turn} * {count} + {at}", "programs that take turns are numbered from another section's first"),
    _one("pallas-loop-short", "backends/pallas.py", "else op.turns", "else op.stop // op.step", "a loop leaves out its ragged last block"),
    _one("pallas-nan-ignored", "backends/pallas.py", "key = jnp.where(x != x, 0x7FFFFFFF,", "key = jnp.where(x != x, -0x80000000,", "the maximum of a row with NaN is a number"),
    _one("pallas-fixed-lost", "backends/pallas.py", "texts[axis] = self.constant(int(text) * step + start, axes)", "texts[axis] = self.constant(int(text), axes)", "start and step of a single element are ignored"),
    _one("pallas-dot-untransposed", "backends/pallas.py", 'right = p.text(op.right) if op.right.axes == (op.axis, n) else f"{p.text(op.right)}.T"',
         "right = p.text(op.right)", "a weight stored by rows is not transposed"),
    _one("pallas-dot-forgets", "backends/pallas.py", 'return product if op.acc is None else f"{p.text(op.acc)} + {product}"', "return product", "a looped product forgets all but its last block"),
    _one("pallas-grid-rounds-down", "jax/launch.py", "grid=(program.programs(sizes),)", "grid=(max(1, program.programs(sizes) - 1),)", "the last program is never started"),
    _one("pallas-plane-lost", "backends/pallas.py", "{axis: self.constant(at, axes) for axis, at in layout.fixed}", "{axis: self.constant(0, axes) for axis, at in layout.fixed}", "a View of one plane of its base reads the first"),
    _one("pallas-part-dropped", "backends/pallas.py", "for turn in range(0, {op.stop}, {op.step}):", "for turn in range(0, {op.stop} - 1, {op.step}):", "a loop that is written out leaves out the last part"),
    _one("pallas-output-start-lost", "backends/pallas.py", '            text = "0" if v is None else self.at(v, axes)\n', '            start = start if isinstance(op, t.Load) else 0\n            text = "0" if v is None else self.at(v, axes)\n', "the start of a View that is written to is ignored"),
    _one('pallas-le-lt', 'backends/pallas.py', '"le": "({a} <= {b})"', '"le": "({a} < {b})"', 'at most is less than'),
    _one('pallas-remainder-floors', 'backends/pallas.py', 'return lax.rem(*jnp.broadcast_arrays(jnp.asarray(a, dtype), jnp.asarray(b, dtype)))', 'return jnp.remainder(a, b)', 'remainders of negative numbers are positive'),
    _one('pallas-half-untransposed', 'backends/pallas.py', 'return half if order == tuple(range(len(order))) else f"jnp.transpose({half}, {order})"', 'return half', 'of two products made as one the halves keep rows for columns'),
    _one('pallas-twice-counted-on', 'backends/pallas.py', 'lanes = f"lax.rem(jnp.arange({2 * block}, dtype=jnp.int32), jnp.int32({block}))"', 'lanes = f"jnp.arange({2 * block}, dtype=jnp.int32)"', "of two products made as one the second one's columns go on where the first one's end"),
    _one('pallas-scan-reversed', 'backends/pallas.py', 'axis={op.value.axes.index(op.axis)})",\n    t.Dot', 'axis={op.value.axes.index(op.axis)}, reverse=True)",\n    t.Dot', 'running sums from the other end'),
    _one('jax-not-aliased', 'jax/launch.py', 'input_output_aliases={read.index(b): wrote.index(b) for b in wrote if b in read}', 'input_output_aliases={}', 'what lies around a View that is written to is lost'),
    _one('view-order-inverted', 'jax/view.py', 'order = [sorted(self.axes).index(a) for a in self.axes]', 'order = [self.axes.index(a) for a in sorted(self.axes)]', 'of a View of three axes in turn the array has the inverse order'),
    _one('view-start-unstepped', 'jax/view.py', 'self.starts[d] + start * self.steps[d]', 'self.starts[d] + start', 'the start of a slice of a stepped View is not multiplied by the step'),
    _one('view-element-unstepped', 'jax/view.py', '(int(i) % self.shape[d]) * self.steps[d]', '(int(i) % self.shape[d])', 'an element of a stepped View is counted without the step'),
    _one('views-may-touch', 'jax/view.py', 'if low > high or', 'if low >= high or', 'Views that have one element in common are taken for apart'),
    _one('views-may-overlap', 'jax/face.py', 'if w.base is v.base and v.overlaps(w):', 'if w.base is v.base and v.same_elements(w):', 'Views that overlap are not refused'),
    _one('one-array-twice', 'jax/face.py', 'alone = all(v.base is not mine.base for n, v in self.views.items() if n != name)', 'alone = True', 'an array that is two operands is updated in place'),
)  # fmt: skip

ARRAY = (
    _one("array-slice-start", "backends/array.py", "slice(i.start, i.start + i.step * (e.sizes[i.axis] - 1) + 1, i.step)", "slice(0, i.step * (e.sizes[i.axis] - 1) + 1, i.step)", "the second half is the first"),
    _one("array-ids-unchecked", "backends/libraries.py", "ok = ok & (i >= 0) & (i < size)", "ok = ok & (i < size)", "ids below zero count from the end"),
    _one("array-old-rows-lost", "backends/libraries.py", "base.clone().index_put", "torch.zeros_like(base).index_put", "rows that are not put are zero"),
    _one("array-division-floors", "backends/libraries.py", '"floordiv": div, "rem": whole(', '"floordiv": jnp.floor_divide, "rem": whole(', "integer division in JAX rounds down"),
    _one('array-le-lt', 'backends/libraries.py', '"le": "less_equal"', '"le": "less"', 'at most is less than in JAX'),
    _one('array-remainder-floors', 'backends/libraries.py', '"rem": lambda a, b: a - div(a, b) * b},', '"rem": torch.remainder},', 'remainders of negative numbers are positive in PyTorch'),
    _one('array-product-narrow', 'backends/torch_product.py', '    a, b = a.float(), b.float()\n', '    if a.dtype == b.dtype != torch.float32:\n        return torch.einsum(equation, a, b).float()\n    a, b = a.float(), b.float()\n', 'products of narrow floats are rounded to them in PyTorch'),
    _one('array-put-wraps', 'backends/libraries.py', 'jnp.where(ok, i, size)', 'jnp.where(ok, i, -1)', 'rows at ids out of range are put last in JAX'),
    _one('array-ties-unstable', 'backends/libraries.py', 'axis=-1, kind="stable")', 'axis=-1)', 'ties are in any order in numpy'),
)  # fmt: skip

EQUIVALENT = (
    _one("store-axes-forgotten", "backends/printer.py", "        axes = {a for v in op.index if v is not None for a in v.axes}\n",
         "        axes = {a for v in op.index if v is not None for a in v.axes[:1]}\n", "of an index over several axes a store sees the first",
         "an index of a store has one axis at most: it runs along that axis, or is the ids of a put, along whose axes `legal` allows blocks of 1 only"),
)  # fmt: skip

TABLE: tuple[Mutant, ...] = (*HISTORICAL, *LOWERING, *PRINTER, *TRITON, *TORCH, *PALLAS, *ARRAY)
