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
    _one("row-stride-ignored", "backends/triton.py",
         'factor = "" if kind == "unit" else stride(at.tensor, axis or "")',
         'dense = len(terms) == 1 and param.axes[-1] is not None and param.axes[-1] != axis\n'
         '                factor = "" if kind == "unit" else self.extent(param.axes[-1]) if dense else stride(at.tensor, axis or "")',
         "logits [M, 60] with stride 64 read as if rows were dense (vLLM 57823, FlashInfer 4713)"),
    _one("stored-then-reloaded", "compile/passes/nest.py",
         '            for node in (w.value, *w.ids):\n'
         '                self._made_before_loops(node, seen)\n',
         "            if w.tensor in {t.name for t in self.graph.tensors.values() if t.role == 'InOut'}:\n"
         "                self._store_group(self.root, self.program.ordered(self.looped & {getattr(i, 'axis', None) for i in w.index}), (w,))\n"
         '            for node in (w.value, *w.ids):\n'
         '                self._made_before_loops(node, seen)\n',
         "a value stored and loaded again by the same program with nothing between (LightLLM's top-k)"),
    _one("nan-is-padding", "lang/ops.py", "where(isnan(x), LOWEST + 2 ** (32 - width),",
         "where(isnan(x), LOWEST,",
         "rows of NaN choose one expert k times (vLLM 39244) or ids out of range (SGLang 30079)"),
    _one("offsets-32-bit", "compile/passes/masks.py",
         'return tuple(axis is not None and (param.layout.wide or axis in dynamic) for axis in param.axes)',
         'return (False,) * len(param.axes)',
         "int32 offsets past 2^31 (Liger 1248 and 1296, megablocks 186, vLLM 42173)"),
    _one("experts-past-256", "compile/passes/nest.py",
         '        home.ops.append(t.TopK(outs, keys,',
         "        near = home.binary('lt', along[0], home.const(256))\n"
         "        keys = home.where(near, keys, home.const(-(2**31)))\n"
         '        home.ops.append(t.TopK(outs, keys,',
         "more than 256 experts ignored (SGLang 23609's neighbours)"),
)  # fmt: skip

EXCHANGE = (
    _one("epoch-stands-still", "compile/passes/exchange.py", 'at=row), d.const(1), "later")', 'at=row), d.const(0), "later")', "every call sends the same epoch, and takes what an earlier one sent"),
    _one("epoch-zero", "compile/passes/exchange.py", "FIRST_AGAIN = 2", "FIRST_AGAIN = 1", "past the last epoch comes one whose slot is in use"),
    _one("one-slot", "compile/tile/ranks.py", "SLOTS = 2", "SLOTS = 1", "a packet of the next call overwrites one that has not been received"),
    _one("ranks-backwards", "compile/passes/exchange.py", 'd.binary("add", a, b), parts)', 'd.binary("add", a, b), parts[::-1])', "parts are added up in another order than that of ranks"),
    _one("another-peers-slot", "compile/passes/exchange.py", "way=ways[op.ranks + n]", "way=ways[op.ranks + (n + 1) % op.ranks]", "what one rank sent is taken for another's"),
    _one("sent-to-one", "compile/passes/exchange.py", "way=ways[peer]", "way=ways[0]", "every packet goes to rank 0"),
    _one("epoch-before-data", "backends/packet.py", 'f"@there st.relaxed.sys.global{_shape(words)} [{at}], {_listed(packets)};"', 'f"@there st.relaxed.sys.global.b32 [{at}+4], {epoch};", f"@there st.relaxed.sys.global.b32 [{at}], {data[0]};"', "an epoch is there before its data"),
    _one("packet-read-twice", "backends/packet.py", 'f"@wait{i} ld.relaxed.sys.global{_shape(words)} {_listed(', 'f"@wait{i} ld.relaxed.sys.global.v{2 * words}.b32 {_listed(', "data and epoch are read by a vector access, which is not promised to be one"),
    _one("second-epoch-unseen", "backends/packet.py", 'setp.ne.s32 other, epoch{i}_1,', 'setp.ne.s32 other, epoch{i}_0,', "of two packets of an access only the first one's epoch is looked at"),
    _one("neighbours-swapped", "compile/passes/exchange.py", 'd.binary("shr", word, d.const(width * k)) if k else word', 'd.binary("shr", word, d.const(width)) if not k and n > len(words) else word', "neighbours that came in one packet stand in each other's place"),
)  # fmt: skip

LOWERING = (
    _one("no-mask-dynamic", "compile/tile/program.py", "        return self.extent is None or self.extent %", "        return self.extent is not None and self.extent %",
         "tokens past the last are loaded and stored"),
    _one("no-mask-whole", "compile/tile/program.py", "            return self.extent != self.block", "            return False", "a block of 64 over 37 columns has no mask"),
    _one("no-mask-looped", "compile/passes/masks.py",
         'if (bounded := self.program.bounded(op.axis)).partial:',
         'if (bounded := self.program.bounded(op.axis)).partial and bounded.mode != "loop":', "the last turn of a loop has no mask"),
    _one("start-off", "backends/printer.py",
         'return f"{text if level >= TIMES else f\'({text})\'} * {axis.block}", TIMES',
         'return f"{text if level >= TIMES else f\'({text})\'} * {max(1, axis.block - 1)}", TIMES', "programs overlap by one element each"),
    _one("no-remask", "compile/passes/masks.py", '            if not self.facts.filled(value, op.axis, identity):', '            if False:', "reductions add up what lies past the end"),
    _one("zero-for-any-identity", "compile/tile/facts.py", 'return op.fill == identity and name in', 'return name in',
         "the zeros of masked lanes take part in max and min"),
    _one("one-mask-of-two", "compile/passes/masks.py", 'mask=tuple(dict.fromkeys(needed))', 'mask=tuple(dict.fromkeys(needed))[:1]', "of two ragged axes only the first is masked"),
    _one("last-block-dropped", "compile/tile/program.py",
         '        return self.share if self.parts > 1 else self.extent\n',
         '        return self.share if self.parts > 1 else self.extent and max(self.block, self.extent // self.block * self.block)\n', "a loop leaves out its ragged last block"),
    _one("parts-start-wrong", "backends/printer.py", '(f" * {owner.share}" if owner.share > 1 else "")', '(f" * {owner.block}" if owner.share > 1 else "")', "the parts of a split axis begin too early"),
    _one("share-rounds-down", "compile/tile/program.py", "return self.each or -(-self.blocks // self.parts) * self.block", "return max(1, self.blocks // self.parts) * self.block", "the parts of a split axis do not reach its end"),
    _one("slice-start-ignored", "compile/passes/nest.py",
         'found.append(entry.each(block))', 'found.append(replace(entry.each(block), start=0))', "the second half is the first"),
    _one("slice-step-ignored", "compile/passes/nest.py",
         'found.append(entry.each(block))',
         'found.append(t.Index(tuple((block(v), 1) for v in entry.values), entry.start))', "interleaved slices are read side by side"),
    _one("ids-unchecked", "compile/passes/masks.py",
         '                needed.append(valid)\n',
         '', "ids out of range reach memory"),
    _one("id-zero-invalid", "backends/printer.py", 'return f"({value} >= 0) & ', 'return f"({value} > 0) & ', "id 0 is taken for padding"),
    _one("store-unmasked", "compile/passes/masks.py",
         '        return [*own, replace(op, at=at)]',
         '        return [*own, replace(op, at=replace(at, mask=()) if isinstance(op, t.Store) else at)]', "stores past the end"),
    _one("load-unmasked", "compile/passes/masks.py",
         '        return [*own, replace(op, at=at)]',
         '        return [*own, replace(op, at=replace(at, mask=()) if isinstance(op, t.Load) else at)]', "loads past the end"),
    _one("second-output-lost", "compile/passes/nest.py",
         'scope.ops.extend(t.Store(at, value) for value, at in values)',
         'scope.ops.extend(t.Store(at, value) for value, at in values[:1])', "only the first of several outputs is stored"),
    _one("index-leaves", "lang/graph.py", '0 <= least <= most < full', 'True', "an index past an end is not checked"),
    _one("joined-late", "lang/indexing.py", 'Index.of(into, -begin)', 'Index.of(into, -begin + (begin > 0))', "what comes after the first begins one element late"),
    _one("longer-axis-unmasked", "compile/tile/facts.py", 'at.start >= 0 and last < (full.extent or 0)', 'True', "elements of a longer axis are read past an end"),
    _one("read-elsewhere-unseen", "compile/schedule/facts.py", 'for name, dims in graph.elsewhere.items() for d in dims}', 'for name, dims in () for d in dims}', "programs read what others update"),
    _one("indices-swapped", "compile/passes/nest.py", '        return t.Access(tensor, tuple(found))', '        return t.Access(tensor, tuple(found[::-1]))', "rows for columns"),
    _one("max-from-zero", "lang/elementwise.py", '("max", "float32"): float("-inf")', '("max", "float32"): 0.0', "the maximum of negative numbers is zero"),
    _one("min-from-zero", "lang/elementwise.py", '("min", "float32"): float("inf")', '("min", "float32"): 0.0', "the minimum of positive numbers is zero"),
    _one("min-int-from-zero", "lang/elementwise.py", '("min", "int32"): 2**31 - 1', '("min", "int32"): 0', "the first index is always 0"),
    _one("product-unwidened", "compile/passes/reductions.py",
         'left, right = (scope.cast(v, "float32") for v in args)',
         'left, right = args', "products are rounded to the operands' dtype"),
    _one("whole-not-remasked", "compile/passes/masks.py",
         'isinstance(op, t.Reduce | t.Accumulate | t.Dot) and self.program.bounded',
         'isinstance(op, t.Accumulate | t.Dot) and self.program.bounded', "a reduction of a whole block is not masked"),
    _one("loop-not-remasked", "compile/passes/masks.py",
         'isinstance(op, t.Reduce | t.Accumulate | t.Dot) and self.program.bounded',
         'isinstance(op, t.Reduce | t.Dot) and self.program.bounded', "the last block of a looped reduction is not masked"),
    _one("dot-not-remasked", "compile/passes/masks.py",
         'isinstance(op, t.Reduce | t.Accumulate | t.Dot) and self.program.bounded',
         'isinstance(op, t.Reduce | t.Accumulate) and self.program.bounded',
         "the matrix unit multiplies what lies past the end"),
    _one("accumulator-from-zero", "compile/passes/reductions.py", 'home.const(IDENTITY[total.kind, total.node.dtype], ', 'home.const(0, ', "a looped maximum begins at zero"),
    _one("last-block-only", "compile/passes/reductions.py",
         'op=total.kind, acc=carry, value=value, axis=axis)',
         'op=total.kind, acc=_identity(scope, total, carry.axes), value=value, axis=axis)', "a looped reduction forgets all but its last block"),
    _one("dot-forgets", "compile/passes/reductions.py",
         '        return _dot(scope, axis, left, right, carry, carry.name)\n'
         '    value',
         '        return _dot(scope, axis, left, right, None, carry.name)\n'
         '    value', "a looped product forgets all but its last block"),
    _one("max-becomes-min", "lang/elementwise.py", '"max": "maximum"', '"max": "minimum"', "looped maxima are combined by minimum"),
    _one("dot-operands-kept", "compile/passes/reductions.py",
         '    if rows in right.axes:\n'
         '        left, right = right, left\n',
         '', "the rows of a product are its columns"),
    _one("accumulator-bfloat16", "compile/passes/reductions.py",
         '    return scope.emit(t.Accumulate, carry.name, op=total.kind, acc=carry, value=value, axis=axis)',
         '    kept = scope.emit(t.Accumulate, carry.name, op=total.kind, acc=carry, value=value, axis=axis)\n'
         "    if kept.dtype == 'float32':\n"
         "        kept = scope.cast(scope.cast(kept, 'bfloat16'), 'float32')\n"
         '    return kept', "sums are kept in bfloat16"),
    Mutant("ties-to-the-higher", "compile/passes/decompose.py", (
        ('d.binary("or", op.keys, d.binary("sub", low_half, op.elements), "packed")', 'd.binary("or", op.keys, op.elements, "packed")'),
        ('d.binary("sub", low_half, inverted)', 'd.binary("add", d.const(0), inverted)')),
        "16-bit ties go to the higher index"),
    _one("ties-struck-together", "compile/passes/decompose.py", 'inner.binary("eq", op.elements, first)', 'inner.binary("eq", keys, top)', "of several equal keys only one is ever chosen"),
    _one("ranks-smeared", "compile/passes/decompose.py", 'inner.binary("eq", op.ranks, rank, "here")', 'inner.binary("le", op.ranks, rank, "here")', "the k-th best everywhere"),
    _one("series-cut-short", "compile/passes/decompose.py", 'SERIES = (15, 13, 11, 9, 7, 5, 3, 1)', 'SERIES = (5, 3, 1)', "softplus's series is cut short"),
    _one("softplus-min", "compile/passes/decompose.py", 'd.binary("maximum", op.value, number(0.0))', 'd.binary("minimum", op.value, number(0.0))', "softplus of the wrong side"),
    _one("where-swapped", "compile/passes/nest.py", '(t.Where, ("condition", "yes", "no"))', '(t.Where, ("condition", "no", "yes"))', "where takes the other branch"),
    _one("operands-swapped", "compile/passes/nest.py", '(t.Binary, ("left", "right"))', '(t.Binary, ("right", "left"))', "a - b is b - a"),
    _one("rounding-dropped", "compile/passes/nest.py",
         '        if n.op in ELEMENTWISE:\n',
         "        if n.op == 'cast' and n.dtype in ('float16', 'bfloat16') and any(node in m.args for m in self.graph.nodes):\n"
         '            return self.value(n.args[0], home)\n'
         '        if n.op in ELEMENTWISE:\n', "a declared rounding inside the declaration is left out"),
    _one("parts-added", "compile/schedule/cuts.py", 'kind = "sum" if node.op == "contract" else node.attr("kind")', 'kind = "sum"', "the parts of a split maximum are added"),
    _one("written-over", "compile/passes/form.py", "return all((n.attr(\"index\"), n.args) == (write.index, write.ids) for n in reads)", "return True", "an output may replace an operand that is still read elsewhere"),
    _one("parts-forgotten", "compile/passes/reductions.py",
         'return [_joined(scope, total, carry, value) for total, carry, value in done]',
         'return [value for total, carry, value in done]', "of the parts done in a row only the last counts"),
    _one("section-unsplit", "compile/schedule/facts.py", "return {a.removesuffix(PART): use.extent or 1 for", "return {a.removesuffix(PART): 1 for", "every part of a split adds up all of the axis"),
    _one("grid-rounds-down", "compile/tile/program.py", 'else -(-sizes[n.name] // n.block) for n in self.counts', 'else max(1, sizes[n.name] // n.block) for n in self.counts', "the last tokens have no program"),
    _one("range-key-lost", "compile/passes/tidy.py", 'for n in op.__dataclass_fields__ if n != "out"', 'for n in op.__dataclass_fields__ if n not in ("out", "axis")', "ids are checked once for two tables of other sizes"),
    _one("updated-first", "compile/schedule/stores.py", "free = next((s for s in left if not any(o.loads & set(s.tensors) for o in left if o is not s)), None)", "free = next(reversed(left), None)", "what overwrites an operand is stored before what loads it again"),
    _one("values-when-stored", "compile/passes/nest.py",
         '            for node in (w.value, *w.ids):\n'
         '                self._made_before_loops(node, seen)\n',
         '            pass\n', "values are made when they are stored, after other stores"),
    _one("loads-before-ids", "compile/passes/motion.py", 'isinstance(op, FREE) and set(t.operands(op)) <= known', 'isinstance(op, FREE)', "a load comes before the reduction that says where from"),
    _one("parts-unmasked", "compile/tile/program.py", "self.extent % (self.block if self.each else self.block * self.parts) != 0", "self.extent % self.block != 0", "the last part of an axis that the parts do not divide has no mask"),
    _one("last-part-dropped", "compile/passes/scope.py", 't.AxisBlock(part_axis(a), n, 1, "loop")', 't.AxisBlock(part_axis(a), n - 1, 1, "loop")', "of the parts done in a row the last is left out"),
    _one("loops-confused", "compile/passes/scope.py", 'for s in reversed(self.chain()) if axis in s.bound', 'for s in self.chain() if axis in s.bound', "within two loops over an axis the outer one's index is taken"),
    _one("dot-right-bare", "compile/passes/masks.py", 'for value in (op.left, op.right) if isinstance(op, t.Dot)', 'for value in (op.left,) if isinstance(op, t.Dot)', "of a product's operands only the first is masked"),
    Mutant("sections-race", "compile/rules/sections.py", (
        ("    if _written(one) & read(other) or _written(other) & read(one):\n        return True\n", ""),
    ), "one section overwrites what another of the launch reads"),
    _one("twins-alike", "compile/passes/reductions.py", 'pair.second.start - pair.first.start', '0', "of two products made as one both have the first one's columns"),
    _one("twins-unmasked", "compile/tile/program.py", 'return self.axis(self.axis(axis).of or axis)', 'return self.axis(axis)', "of two products made as one the last block of columns has no mask"),
    _one("scratch-bfloat16", "compile/schedule/cuts.py", 'scratch[i] = Scratch(name, node.dtype,', 'scratch[i] = Scratch(name, "bfloat16" if node.dtype == "float32" else node.dtype,', "partial results are kept in bfloat16"),
    _one("overlap-in-the-last-row", "torch/overlap.py", "sum((n - 1) * s for n", "sum((n - 2) * s for n", "an output may overlap the last row of an operand"),
    _one("overlap-of-halves", "torch/overlap.py", "    ranges[1][0] -= b[2] - 1\n    ranges[1][1] += a[2] - 1\n", "    ranges[1][0] -= 0\n", "an output may lie in the halves of an operand's elements"),
    _one("overlap-by-range", "torch/overlap.py", "    return _shared(a.start", "    return True or _shared(a.start", "tensors that take turns in one array are refused"),
    _one('zero-after-any-function', "compile/tile/facts.py", 'isinstance(op, Cast | Bitcast):', 'isinstance(op, Cast | Bitcast | Unary):', 'where nothing was loaded every function of it is taken for zero'),
    _one('series-coefficient', "compile/passes/decompose.py", '(15, 13, 11, 9, 7, 5, 3, 1)', '(15, 13, 11, 8, 7, 5, 3, 1)', "one coefficient of softplus's series is wrong"),
    Mutant('ties-of-32-bits-to-the-higher', "compile/passes/decompose.py", (
        ('keys, top), op.elements, highest)', 'keys, top), op.elements, lowest)'),
        ('_reduce(inner, "min", candidates', '_reduce(inner, "max", candidates')), 'ties of float32 go to the higher index'),
    _one('zeros-of-one-sign', "lang/trace.py", 'if negative_zero else', 'if False else', 'constants 0.0 and -0.0 are one'),
    _one('ids-past-the-end', "backends/printer.py", 'return f"({value} >= 0) & ({value} < {self.extent(op.axis)})", AND', 'return f"({value} >= 0) & ({value} >= 0)", AND', 'ids are checked at zero only'),
    _one('ids-32-bit', "compile/passes/masks.py",
         'wide=wide(self.program, param))',
         'wide=tuple(w and all(isinstance(f.made_by.get(v), t.Elements) for v in i.values) for w, i in zip(wide(self.program, param), op.at.index)))', 'offsets of rows chosen by ids are computed in 32 bits'),
    _one('ids-narrowed', "compile/passes/nest.py",
         'else self.value(args[term], scope)',
         "else scope.cast(v, 'int32' if v.dtype == 'int64' else v.dtype) if (v := self.value(args[term], scope)) else v", 'ids of 64 bits are cut to 32 before they are checked'),
    _one('start-times-step', "compile/passes/nest.py",
         'found.append(entry.each(block))',
         'found.append(replace(entry.each(block), start=entry.start * max((n for _, n in entry.terms), default=1)))', "a slice's start is multiplied by its step"),
    _one('second-block-lost', "compile/tile/program.py",
         'return tuple(a if a.extent is None else a.beside or a.blocks for a in map(self.axis, self.grid))',
         'return tuple(a if a.extent is None else 1 if a.extent < 2 * a.block else a.beside or a.blocks for a in map(self.axis, self.grid))', 'an axis of less than two blocks has no program for the second'),
    _one('loops-shared-across', "compile/passes/reductions.py", '    return low.looped & set(a.axes) == low.looped & set(b.axes)', '    return True', 'reductions in other loops share one'),
    _one('scratch-confused', 'compile/schedule/cuts.py', 's = scratch[i]', 's = next(iter(scratch.values()))', "every sum of parts reads the first one's parts"),
    _one('parallel-if-any', 'compile/schedule/facts.py', 'parallel = set.intersection(*spreads)', 'parallel = set.union(*spreads)', 'an axis that some output lacks is cut into programs'),
    _one('over-what-others-read', 'compile/passes/form.py', '(n.attr("index"), n.args) == (write.index, write.ids)', 'n.args == write.ids', 'an output may replace an operand of which it reads other elements'),
    _one('twins-step-lost', "compile/passes/reductions.py",
         '(*each.terms, (sides, 1))', '(*((v, 1) for v in each.values), (sides, 1))', 'of two products made as one every column is taken for every second'),
    _one('twins-of-other-steps', "compile/schedule/facts.py", 'i.terms == j.terms', 'i.axes == j.axes', 'products of side by side and of interleaved columns are made as one'),
    _one('twins-of-two-tensors', "compile/schedule/facts.py", ' or one.attr("tensor") != other.attr("tensor")', '', 'products with columns of two weights are made as one'),
    _one('parts-for-few-rows-only', 'compile/rules/choose.py', '_launch(graph, tile, columns, split)', '_launch(graph, tile, columns)', "with many rows a sum is not made in parts: a row's bits depend on T"),
    _one('tile-decides-a-sum', 'compile/rules/gemm.py', 'if gemm is None or not products_alone(graph):', 'if gemm is None:', "a sum beside a product goes by its tile: a row's bits depend on T"),
    _one('max-int64-from-zero', "lang/elementwise.py", '("max", "int64"): -(2**63)', '("max", "int64"): 0', 'the maximum of negative numbers of 64 bits is zero'),
    _one('min-int64-narrow', "lang/elementwise.py", '("min", "int64"): 2**63 - 1', '("min", "int64"): 2**31 - 1', 'the minimum of numbers past 2^31 is 2^31'),
    _one('overlap-of-equal-strides', 'torch/overlap.py', 'doubled |= s in ranges', 'doubled |= False', 'a tensor of two equal strides is taken for one that does not meet itself'),
    _one('neg-from-zero', "compile/passes/legalise.py", 'if not isinstance(op, t.Unary) or op.op != "neg" or not is_float(op.out.dtype):', 'if True:', '-x is 0 - x in Triton, which loses the sign of zero'),
)  # fmt: skip

PRINTER = (
    _one("program-id-undecoded", "backends/printer.py", '(self.word("rem", text, count_of(several[at][1])) if at > 0 else text)', 'text', "an inner grid axis is not taken modulo its blocks"),
    _one("store-axes-turned", "compile/tile/program.py",
         'return tuple(a.name for a in self.axes if a.name in axes)',
         'return tuple(a.name for a in reversed(self.axes) if a.name in axes)', "a store takes its axes in another order than its value has"),
)  # fmt: skip

TRITON = (
    _one("triton-section-offset", "backends/printer.py", 'at + (f" - {begin}" if begin != "0" else "")', 'at + (f" - {begin}" if begin != "0" and abreast else "")', "a later section's programs are numbered from the launch's first"),
    _one("triton-mask-le", "backends/printer.py", 'return f"{value} < {self.extent(op.axis)}", COMPARED', 'return f"{value} <= {self.extent(op.axis)}", COMPARED', "one element past the end"),
    _one("triton-abreast-offset", "backends/printer.py", 'at + (f" - {begin}" if begin != "0" else "")', 'at + (f" - {begin}" if begin != "0" and not abreast else "")', "programs that take turns are numbered from another section's first"),
    _one("triton-flat-keeps", "compile/passes/flatten.py", '(*t.substitute(op.yields, last), *loop.inits)', '(*t.substitute(op.yields, last), *loop.yields)', "a loop printed as one with the one in it does not begin its sum anew in each part"),
    _one("triton-flat-early", "backends/triton.py", 'if turn % {count} == {count - 1}:', 'if turn % {count} == {count - 2}:', "a loop printed as one with the one in it ends each part a turn early"),
    _one("triton-half-turned", "backends/triton.py", '{(*places, at)}))"', '{(*places, at)}))[::-1]"', "of two products made as one each gets the other's half"),
    _one("triton-unit-lost", "backends/triton.py", "= {a.name} * {a.unit}\"", "= {a.name}\"", "strides in units of 16 bytes taken for elements"),
    _one("triton-32-bit", "backends/triton.py",
         'if wide and not terms:', 'if False:', "the 64-bit product is printed in 32 bits"),
    _one("triton-store-mask", "backends/triton.py", '{f\', mask={mask}\' if mask else \'\'})"', '{\'\'})"', "stores are not masked"),
    _one("triton-load-mask", "backends/triton.py", "{f', mask={mask}, other={fill}' if mask else ''}", "{''}", "loads are not masked"),
    _one("triton-load-fill", "backends/triton.py", "other={fill}'", "other=1'", "masked lanes read as one"),
    _one("triton-dot-forgets", "backends/triton.py", '    acc = f", {p.text(op.acc)}" if op.acc is not None else ""\n', '    acc = ""\n', "tl.dot without its accumulator"),
    _one("triton-cast-lost", "backends/triton.py", '"cast": "{}.to({})"', '"cast": "{0}"',
         "narrowing casts are not printed"),
    _one("triton-bitcast-converts", "backends/triton.py", ", bitcast=True)", ")", "bits are converted instead of read"),
    _one("triton-loop-short", "backends/triton.py", 'f"{self.begin(axis)[0]}, {last}, {axis.step}"', 'f"{self.begin(axis)[0]}, {last} - {axis.block} + 1, {axis.step}"', "a loop leaves out its ragged last block"),
    _one("rounds-left-out", "compile/tile/program.py", "return self.block * max(1, self.beside)", "return self.block * max(1, 2 * self.beside)", "programs that take turns leave every other round out"),
    _one("triton-grid-mixed", "backends/triton.py", '"div": "{} // {}", "rem": "{} % {}"', '"div": "{} % {}", "rem": "{} // {}"', "division for remainder in the program id"),
    _one("triton-reduce-other", "backends/triton.py", '    return f"tl.{op.op}({p.text(op.value)}, axis={axis})"', '    return f"tl.max({p.text(op.value)}, axis={axis})"', "every reduction is a maximum"),
    _one("triton-scan-reversed", "backends/triton.py", '"tl.cumsum({}, axis={})"', '"tl.cumsum({}, axis={}, reverse=True)"', "running sums from the other end"),
    _one("triton-bfloat16-lost", "backends/printer.py", '        word = self.words["cast"', '        if isinstance(op, t.Cast) and op.out.dtype == "bfloat16":\n            return self.text(op.value)\n        word = self.words["cast"', "casts to bfloat16 are not printed"),
    _one("triton-tf32", "backends/triton.py", ', input_precision="ieee")', ")", "float32 operands of a product are rounded to TF32"),
    _one("triton-nan-dropped", "backends/triton.py", "return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)", "return tl.maximum(a, b)", "the maximum of a row with NaN is a number"),
    _one("triton-part-dropped", "backends/triton.py", 'tl.static_range({counts[0]})', 'tl.static_range({counts[0]} - 1)', "a loop that is written out leaves out the last part"),
    _one("triton-section-starts-late", "backends/printer.py", '({at} >= {begin}) & ({at} < {end})', '({at} > {begin}) & ({at} < {end})', "the first program of a later section does nothing"),
    _one('triton-lt-le', "backends/printer.py", '"lt": ("<", COMPARED)', '"lt": ("<=", COMPARED)', 'less than is at most'),
    _one('triton-le-lt', "backends/printer.py", '"le": ("<=", COMPARED)', '"le": ("<", COMPARED)', 'at most is less than'),
    _one('triton-remainder-floors', "backends/triton.py",
         '        return p.operator(op)\n',
         "        if op.op == 'rem':\n"
         '            a, b = p.text(op.left, ATOM), p.text(op.right, ATOM)\n'
         "            return f'(({a} % {b}) + {b}) % {b}', TIMES\n"
         '        return p.operator(op)\n', 'remainders of negative numbers are positive'),
    _one('triton-maximum-nan', "backends/triton.py", "{', propagate_nan=tl.PropagateNan.ALL' if is_extreme(op) else ''}", "{''}", 'the larger of a number and NaN is the number'),
    Mutant('triton-half-interleaved', 'backends/triton.py', (
        ('shape += [2, n // 2] if a == op.axis else [n]', 'shape += [n // 2, 2] if a == op.axis else [n]'),
        ('at, of = op.value.axes.index(op.axis), p.program.axis(op.axis).of', 'at, of = op.value.axes.index(op.axis) + 1, p.program.axis(op.axis).of')), 'of two products made as one every second column is one'),
    _one('triton-twice-divided', "backends/printer.py", 'self.word("rem", lanes, axis', 'self.word("div", lanes, axis', 'of two products made as one the columns are counted by division'),
    Mutant('triton-wide-late', "backends/triton.py", (
        ('text, level = self.index(at.tensor, index, axes, wide)', 'text, level = self.index(at.tensor, index, axes, False)'),
        ('terms.append(f"{text} * {factor}" if factor else text)', 'terms.append(f"tl.cast({text} * {factor}, tl.int64)" if factor else text)')),
        'an offset is widened after it is computed'),
    _one('triton-blocks-floor', "backends/printer.py", 'f"tl.cdiv({extent_name(blocks.name)}, {blocks.block})"', 'f"({extent_name(blocks.name)} // {blocks.block})"', 'the blocks of an axis are counted without the last ragged one'),
    _one('triton-negative-zero-lost', "compile/passes/legalise.py", 'TARGETS[target].faults]', 'TARGETS[target].faults[:3]]', 'a literal -0.0 is 0.0'),
)  # fmt: skip

TORCH = (
    _one('aligned-to-8', 'compile/tile/layouts.py', 'stride * size % 16 == 0 and', 'stride * size % 8 == 0 and', 'strides of a multiple of 8 bytes are counted in units of 16'),
    _one('reach-of-2-31', 'compile/tile/layouts.py', 'wide=reach >= 2**31', 'wide=reach > 2**31', 'an offset of exactly 2^31 is computed in 32 bits'),
    _one('written-one-by-one', 'torch/call.py', 'ready = {n: _apart(values[n] if n in self.outs else _dense(values[n]), held) for n in self.names}', 'ready = {n: values[n] if n in self.outs else _dense(values[n]) for n in self.names}', 'an output goes over the operand that another output is, before that is copied'),
    _one('outputs-overlap', 'torch/call.py', '                if m != n and overlap(r, s):\n', '                if m != n and r == s:\n', 'two outputs may overlap each other'),
    _one('own-operand-overlaps', 'torch/call.py', 'not (m == n and r == s)', 'not m == n', 'an update may overlap its own operand, shifted'),
)  # fmt: skip

PALLAS = (
    _one("pallas-section-offset", "backends/pallas.py", 'passed = [call.own, ', 'passed = ["pid", ', "a later section's programs are numbered from the launch's first"),
    _one("pallas-mask-le", "backends/printer.py", '({value} < {self.extent(op.axis)})", AND', '({value} <= {self.extent(op.axis)})", AND', "one element past the end"),
    _one("pallas-start-lost", "backends/pallas.py", 'first = str(index.start * step + start)', 'first = str(index.start * step)', "a View's start is ignored"),
    _one("pallas-step-lost", "backends/pallas.py", '{own * step}" if own * step != 1', '{own}" if own != 1', "a View's step is ignored"),
    _one("pallas-axes-reversed", "backends/pallas.py", "for axis in range(len(layout.base)))", "for axis in reversed(range(len(layout.base))))", "a View's axes in the wrong order"),
    _one("pallas-store-mask", "backends/pallas.py", '{self.spread(op.value, axes)}{self.masked(op.at, axes)})"', '{self.spread(op.value, axes)})"', "stores are not masked"),
    _one("pallas-load-fill", "backends/pallas.py", "f', other={fill}' if mask", "', other=1' if mask", "masked lanes read as one"),
    _one("pallas-abreast-offset", "backends/pallas.py", 'passed = [call.own, ', 'passed = [call.own.replace("turn", "0"), ', "programs that take turns all do the first block"),
    _one("pallas-loop-short", "backends/pallas.py",
         'return str(prod(map(self.program.turns, op.over)))',
         'return str(prod((self.program.axis(a).length or 0) // self.program.axis(a).block if isinstance(a, str) else a for a in op.over))', "a loop leaves out its ragged last block"),
    _one("pallas-nan-ignored", "backends/pallas.py", "key = jnp.where(x != x, 0x7FFFFFFF,", "key = jnp.where(x != x, -0x80000000,", "the maximum of a row with NaN is a number"),
    _one("pallas-fixed-lost", "backends/pallas.py",
         '            return self.fixed(first, axes)\n',
         '            return self.fixed(str(index.start), axes)\n', "start and step of a single element are ignored"),
    _one("pallas-dot-untransposed", "backends/pallas.py", 'right = p.text(op.right, ATOM) + (".T" if op.right.axes != (op.axis, n) else "")', 'right = p.text(op.right, ATOM)', "a weight stored by rows is not transposed"),
    _one("pallas-dot-forgets", "backends/pallas.py", 'return product if op.acc is None else (f"{p.text(op.acc, PLUS)} + {product}", PLUS)', 'return product', "a looped product forgets all but its last block"),
    _one("pallas-grid-rounds-down", "jax/launch.py", "grid=(program.programs(sizes),)", "grid=(max(1, program.programs(sizes) - 1),)", "the last program is never started"),
    _one("pallas-plane-lost", "backends/pallas.py",
         '{axis: self.fixed(str(element), axes) for axis, element in layout.fixed}',
         '{axis: self.fixed("0", axes) for axis, element in layout.fixed}', "a View of one plane of its base reads the first"),
    _one("pallas-part-dropped", "backends/pallas.py", 'for turn in range({self.program.turns(op.over[0])}):', 'for turn in range({self.program.turns(op.over[0])} - 1):', "a loop that is written out leaves out the last part"),
    _one("pallas-output-start-lost", "backends/pallas.py",
         'texts[axis] = self.element(at.tensor, index, axes, start, step)',
         "texts[axis] = self.element(at.tensor, index, axes, start if self.program.param(at.tensor).role != 'Out' else 0, step)", "the start of a View that is written to is ignored"),
    _one('pallas-le-lt', "backends/pallas.py",
         '        return p.operator(op)\n',
         '        if op.op == "le":\n'
         '            return f"{p.at(op.left, op.out.axes, PLUS)} < {p.at(op.right, op.out.axes, PLUS)}", LOOSEST\n'
         '        return p.operator(op)\n', 'at most is less than'),
    _one('pallas-remainder-floors', 'backends/pallas.py', 'return lax.rem(*jnp.broadcast_arrays(jnp.asarray(a, dtype), jnp.asarray(b, dtype)))', 'return jnp.remainder(a, b)', 'remainders of negative numbers are positive'),
    _one('pallas-half-untransposed', "backends/pallas.py", 'return halves if order == tuple(range(len(order))) else f"', 'return halves if True else f"', 'of two products made as one the halves keep rows for columns'),
    _one('pallas-twice-counted-on', "backends/printer.py", 'lanes = self.word("rem", lanes, axis.strip) if axis.of else lanes', 'lanes = lanes', "of two products made as one the second one's columns go on where the first one's end"),
    _one('pallas-scan-reversed', 'backends/pallas.py', '"lax.cumsum({}, axis={})"', '"lax.cumsum({}, axis={}, reverse=True)"', 'running sums from the other end'),
    _one('jax-not-aliased', 'jax/launch.py', 'input_output_aliases={read.index(b): wrote.index(b) for b in wrote if b in read}', 'input_output_aliases={}', 'what lies around a View that is written to is lost'),
    _one('view-order-inverted', 'jax/view.py', 'order = [sorted(self.axes).index(a) for a in self.axes]', 'order = [self.axes.index(a) for a in sorted(self.axes)]', 'of a View of three axes in turn the array has the inverse order'),
    _one('view-start-unstepped', 'jax/view.py', 'self.starts[d] + start * self.steps[d]', 'self.starts[d] + start', 'the start of a slice of a stepped View is not multiplied by the step'),
    _one('view-element-unstepped', 'jax/view.py', '(int(i) % self.shape[d]) * self.steps[d]', '(int(i) % self.shape[d])', 'an element of a stepped View is counted without the step'),
    _one('views-may-touch', 'jax/view.py', 'if low > high or', 'if low >= high or', 'Views that have one element in common are taken for apart'),
    _one('views-may-overlap', 'jax/face.py', 'if w.base is v.base and v.overlaps(w):', 'if w.base is v.base and v.same_elements(w):', 'Views that overlap are not refused'),
    _one('one-array-twice', 'jax/face.py', 'alone = all(v.base is not mine.base for n, v in self.views.items() if n != name)', 'alone = True', 'an array that is two operands is updated in place'),
)  # fmt: skip

ARRAY = (
    _one("array-slice-start", "backends/array.py", "slice(entry.start, last + 1, steps[-1])", "slice(0, last - entry.start + 1, steps[-1])", "the second half is the first"),
    _one("array-ids-unchecked", "backends/libraries.py", "ok = ok & (i >= 0) & (i < size)", "ok = ok & (i < size)", "ids below zero count from the end"),
    _one("array-old-rows-lost", "backends/libraries.py", "torch.cat((base.reshape(-1), ", "torch.cat((torch.zeros_like(base).reshape(-1), ", "rows that are not put are zero"),
    _one("array-division-floors", "backends/libraries.py", '"floordiv": div, "rem": whole(', '"floordiv": jnp.floor_divide, "rem": whole(', "integer division in JAX rounds down"),
    _one('array-le-lt', 'backends/libraries.py', '"le": "less_equal"', '"le": "less"', 'at most is less than in JAX'),
    _one('array-remainder-floors', 'backends/libraries.py', '"rem": lambda a, b: a - div(a, b) * b,', '"rem": torch.remainder,', 'remainders of negative numbers are positive in PyTorch'),
    _one('array-product-narrow', 'backends/torch_product.py', '    a, b = a.float(), b.float()\n', '    if a.dtype == b.dtype != torch.float32:\n        return torch.einsum(equation, a, b).float()\n    a, b = a.float(), b.float()\n', 'products of narrow floats are rounded to them in PyTorch'),
    _one('array-put-wraps', 'backends/libraries.py', 'jnp.where(ok, i, size)', 'jnp.where(ok, i, -1)', 'rows at ids out of range are put last in JAX'),
    _one('array-ties-unstable', 'backends/libraries.py', 'axis=-1, kind="stable")', 'axis=-1)', 'ties are in any order in numpy'),
)  # fmt: skip

EQUIVALENT = (
    _one("store-axes-forgotten", "compile/tile/operations.py",
         'for a in v.axes)\n'
         '\n'
         '\n'
         '@dataclass(frozen=True)\n'
         'class Const',
         'for a in i.value.axes[:1])\n'
         '\n'
         '\n'
         '@dataclass(frozen=True)\n'
         'class Const', "of an index over several axes a store sees the first",
         "an index of a store has one axis at most: it runs along that axis, or is the ids of a put, along whose axes `legal` allows blocks of 1 only"),
)  # fmt: skip

TABLE: tuple[Mutant, ...] = (*HISTORICAL, *EXCHANGE, *LOWERING, *PRINTER, *TRITON, *TORCH, *PALLAS, *ARRAY)
