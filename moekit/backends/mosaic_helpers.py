"""What emitted Mosaic GPU kernels begin with, as text: layouts, and accesses by pointer that take any index and mask.

An access takes `width` elements at a time, which lie side by side. Masked lanes read the first element of the array, which is
always there, and write nothing. `spread_to` is for a product's blocks: of two that are of one shape and spread from the same
Mosaic makes one, and finds no layout for it.

A product of few rows hangs on a barrier, past which no load goes: ptxas would load half of what a turn takes, and wait for it,
before it asks for the other half; and LLVM would move what only a masked store needs into that store's branch.
"""

from __future__ import annotations

IMPORTS = {  # helper → what it needs above it
    "tiled": ("import math", "from jax.experimental.mosaic import gpu as mgpu"),
    "accesses": (
        "import numpy as np",
        "from jax.experimental.mosaic import gpu as mgpu",
        "from jax.extend.mlir import ir",
        "from jax.extend.mlir.dialects import arith, vector",
    ),
    "mma": ("import numpy as np", "from jax.experimental.mosaic import gpu as mgpu", "from jax.extend.mlir import ir"),
    "staged": (
        "import itertools",
        "import math",
        "from jax.experimental import pallas as pl",
        "from jax.extend.mlir.dialects import arith, vector",
    ),
    "barrier": ("from jax.experimental.mosaic import gpu as mgpu",),
    "program": ("from jax import lax",),
    "spread": ("from jax import lax",),
    "sections": ("from jax.experimental import pallas as pl",),
}

MOSAIC = {
    "program": """def program():
    return lax.axis_index("program")
""",
    "lanes": """def lanes(n, layout):
    return plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=layout)
""",
    "spread": """def spread(x, shape, *dims):
    return lax.broadcast_in_dim(x, shape, dims)
""",
    "spread_to": """def spread_to(layout, x, shape, *dims):
    gone = tuple(d for d in range(len(shape)) if d not in dims)
    made, held = plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout), layout.to_mgpu()
    given = layout.reduce(gone[0] if len(gone) == 1 else gone)
    return plgpu.inline_mgpu(arg_types=(given,), return_type=made)(lambda _, x: x.broadcast_in_dim(shape, dims, held))(x)
""",
    "trunc_div": """def trunc_div(a, b):
    return lax.div(*jnp.broadcast_arrays(jnp.int32(a), jnp.int32(b)))
""",
    "trunc_rem": """def trunc_rem(a, b):
    return lax.rem(*jnp.broadcast_arrays(jnp.int32(a), jnp.int32(b)))
""",
    "nan_max": """def nan_max(x, axis):
    return jnp.max(x, axis=axis)
""",
    "nan_min": """def nan_min(x, axis):
    return jnp.min(x, axis=axis)
""",
    "barrier": """def barrier():
    plgpu.inline_mgpu()(lambda context: mgpu.warpgroup_barrier())()
""",
    "tiled": """def tiled(warps, lanes, vector, turned=False, copies_first=False):
    inner = tuple(a * b for a, b in zip(lanes, vector))
    outer = tuple(a * b for a, b in zip(warps, inner))
    n = len(vector)

    def shared(counts, first, threads):
        copies = threads // math.prod(counts)
        split = [first + d for d in (range(n)[::-1] if turned else range(n)) if counts[d] > 1]
        same = [plgpu.Replicated(copies)] * (copies > 1)
        return tuple(same + split if copies_first else split + same)

    along = next((d - n for d in range(n) if vector[d] > 1), -1)
    made = mgpu.TiledLayout(
        plgpu.Tiling((outer, inner, vector)), shared(warps, -3 * n, 4), shared(lanes, -2 * n, 32), along, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)
""",
    "laid": """def laid(x, layout):
    return plgpu.layout_cast(x, layout)
""",
    "mma": """def mma_pairs(lines):
    n = ir.VectorType(lines.flat[0].type).shape[0]
    pairs = np.empty((*lines.shape, n // 2), dtype=object)
    for *at, k in np.ndindex(pairs.shape):
        pairs[*at, k] = mgpu.utils.vector_slice(lines[*at], slice(2 * k, 2 * k + 2))
    return pairs.reshape(len(lines), -1, 2)


def mma_lines(x, along):
    spans = x.shape[along] // (4 * x.layout.vector_length)
    return np.moveaxis(x.registers.reshape((-1, spans) if along else (spans, -1)), along, 1)


def mma_held(acc):
    word, none = ir.IntegerType.get_signless(32), mgpu.c(0, ir.IntegerType.get_signless(1))
    ask = "bar.red.popc.u32 $0, 0, 128, $1;"
    zero = mgpu.utils.inline_ptx(ask, none, result_types=word, has_side_effects=True, convergent=True)
    zero = mgpu.FragmentedArray.splat(zero, acc.shape, acc.layout, is_signed=False)
    return (acc.bitcast(word, output_is_signed=False) | zero).bitcast(acc.mlir_dtype)


def mma_steps(rows, columns, acc, dtype, warps):
    m, n, k = len(rows) // 2, len(columns), rows.shape[1]
    kinds = mgpu.MMALayouts(dtype, m_warps=warps)

    def given(registers, shape, layout):
        registers = registers.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    found = mgpu.mma(
        given(acc.registers.reshape(m, 2, n).swapaxes(1, 2), (16 * warps * m, 32 // warps * n), kinds.acc),
        given(rows.reshape(m, 2, k, 2).transpose(0, 2, 3, 1), (16 * warps * m, 16 * k), kinds.lhs),
        given(columns.swapaxes(0, 1), (16 * k, 32 // warps * n), kinds.rhs),
    )
    registers = found.registers.reshape(m, n, 2).swapaxes(1, 2).reshape(acc.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)


def mma(left, right, acc, along, layouts, warps):
    made = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layouts[2])

    @plgpu.inline_mgpu(arg_types=layouts, return_type=made)
    def multiplied(context, left, right, acc):
        rows, columns = (mma_pairs(mma_lines(x, a)) for x, a in zip((left, right), along))
        acc = mma_held(acc) if warps * len(rows) == 2 else acc
        return mma_steps(rows, columns, acc, left.mlir_dtype, warps)

    return multiplied(left, right, plgpu.layout_cast(acc, layouts[2]))
""",
    "staged": """def asked(ref, index, layout, mask=None, width=1):
    return ref, *given(index, mask, layout), layout, mask is not None, width


class Staged:
    def __init__(self, operand, array, room, at, along, own, copies, first):
        _, blocks, _, layout, masked, self.width = operand
        held, shape = layout.to_mgpu(), jnp.broadcast_shapes(*map(jnp.shape, blocks))
        self.array, self.room, self.at, self.index = array, room, at, at[:-1] if masked else at
        self.mask, self.near, self.copies, self.own = masked or None, held.vector_length, copies, own
        self.kind, spans = ir.MemRefType(array.type).element_type, shape[along] // (4 * held.vector_length)
        registers = np.arange(math.prod(held.registers_shape(shape)))
        self.lines = np.moveaxis(registers.reshape((-1, spans) if along else (spans, -1)), along, 1).reshape(-1, spans // 2, 2)
        word = ir.IntegerType.get_signless(32)
        warp = arith.remui(mgpu.utils.warp_idx(sync=False), mgpu.c(4, word))
        self.lane = arith.remui(mgpu.utils.thread_idx(), mgpu.c(32, word))
        by, self.sizes = mgpu.c(own if first else copies, word), ir.MemRefType(array.type).shape
        found = arith.divui(warp, by), arith.remui(warp, by)
        mine, self.copy = found[::-1] if first else found
        self.mine = arith.muli(mine, mgpu.c(32, word))

    def place(self, line, part, span, k=0, lane=None):
        index, lane = ir.IndexType.get(), self.lane if lane is None else lane
        lane = arith.addi(arith.xori(lane, mgpu.c(4 * span, lane.type)), self.mine)
        before = ((part * 2 + span) * len(self.lines) + line) * self.own * 32
        place = arith.addi(arith.index_cast(index, lane), mgpu.c(before, index))
        return arith.addi(arith.muli(place, mgpu.c(self.near, index)), mgpu.c(k, index))

    def ask(self, part):
        lines, word = range(len(self.lines)), self.copy.type
        if self.width < self.near or math.prod(self.sizes) >= 2**31:
            for line, span, k in np.ndindex(len(self.lines), 2, self.near // self.width):
                from_, there = places(self.at, self.index, self.mask, self.lines[line, part, span], k * self.width)
                self.piece(from_, there, self.place(line, part, span, k * self.width))
            return
        halves = [arith.remui(self.copy, mgpu.c(2, word))] if self.copies > 1 else [mgpu.c(0, word), mgpu.c(1, word)]
        later = arith.cmpi(arith.CmpIPredicate.uge, self.copy, mgpu.c(2, word))
        pairs = zip(lines[::2], lines[1::2]) if self.copies == 4 and len(lines) % 2 == 0 else zip(lines, lines)
        for (one, other), half in itertools.product([*pairs], halves):
            self.line(one, other, later, part, half)

    def offset(self, line, part, span):
        word, register = ir.IntegerType.get_signless(32), self.lines[line, part, span]
        strides, _ = ir.MemRefType(self.array.type).get_strides_and_offset()
        place = [element(x, register, 0) for x in self.at[: len(self.index)]]
        found = mgpu.utils.dyn_dot(place, [mgpu.c(s, word) for s in strides])
        if self.mask is None:
            return found
        there = element(self.at[-1], register, 0)
        there = arith.cmpi(arith.CmpIPredicate.ne, there, mgpu.c(0, there.type))
        return arith.select(there, found, mgpu.c(-1, word))

    def line(self, one, other, later, part, half):
        word, lane = ir.IntegerType.get_signless(32), self.lane
        row = arith.addi(arith.divui(lane, mgpu.c(8, word)), arith.muli(half, mgpu.c(4, word)))
        by = arith.addi(arith.muli(row, mgpu.c(4, word)), arith.remui(lane, mgpu.c(4, word)))

        def of(made):
            return made(one) if one == other else arith.select(later, made(other), made(one))

        def shuffled(x):
            ask = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
            return mgpu.utils.inline_ptx(ask, x, by, result_types=word, has_side_effects=True, convergent=True)

        offsets = [shuffled(of(lambda line: self.offset(line, part, span))) for span in (0, 1)]
        near = arith.cmpi(arith.CmpIPredicate.ult, arith.remui(lane, mgpu.c(8, word)), mgpu.c(4, word))
        found = arith.select(near, *offsets)
        to = arith.select(near, *(of(lambda line: self.place(line, part, span, lane=by)) for span in (0, 1)))
        there = arith.cmpi(arith.CmpIPredicate.sge, found, mgpu.c(0, word)) if self.mask is not None else None
        found = found if there is None else arith.select(there, found, mgpu.c(0, word))
        self.copied(arith.extui(ir.IntegerType.get_signless(64), found), there, to)

    def piece(self, place, there, to):
        index = ir.IndexType.get()
        place = place if there is None else [arith.select(there, i, mgpu.c(0, index)) for i in place]
        if self.width * mgpu.bytewidth(self.kind) < 4:
            kind = ir.VectorType.get((self.width,), self.kind)
            found, zero = vector.load(kind, self.array, place), vector.broadcast(kind, mgpu.c(0, self.kind))
            vector.store(found if there is None else arith.select(there, found, zero), self.room, [to])
            return
        strides, _ = ir.MemRefType(self.array.type).get_strides_and_offset()
        offset = mgpu.utils.dyn_dot(place, [mgpu.c(s, index) for s in strides])
        self.copied(arith.index_cast(ir.IntegerType.get_signless(64), offset), there, to)

    def copied(self, offset, there, to):
        word, size = ir.IntegerType.get_signless(32), self.width * mgpu.bytewidth(self.kind)
        to = arith.index_cast(ir.IntegerType.get_signless(64), to)
        ends = ((self.room, to), (self.array, offset))
        ends = [mgpu.utils.getelementptr(mgpu.utils.memref_ptr(x), [i], self.kind) for x, i in ends]
        bytes = mgpu.c(size, word) if there is None else arith.select(there, mgpu.c(size, word), mgpu.c(0, word))
        ask = f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global [$0], [$1], {size}, $2;"
        mgpu.utils.inline_ptx(ask, *ends, bytes, has_side_effects=True)

    def found(self, part):
        kind, made = ir.VectorType.get((self.near,), self.kind), np.empty((len(self.lines), 2), dtype=object)
        for line, span in np.ndindex(made.shape):
            made[line, span] = vector.load(kind, self.room, [self.place(line, part, span)], alignment=16)
        return mma_pairs(made)


def mma_staged(left, right, acc, along, layouts, warps):
    made = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layouts[2])
    sizes = [math.prod(jnp.broadcast_shapes(*map(jnp.shape, x[1]))) for x in (left, right)]
    wide = 4 // warps

    @plgpu.inline_mgpu(
        arg_types=(*((plgpu.RefType(), plgpu.RefType(), *x[2]) for x in (left, right)), layouts[2]), return_type=made
    )
    def multiplied(context, a, b, acc):
        first = Staged(left, a[0], a[1], a[2:], along[0], warps, wide, False)
        second = Staged(right, b[0], b[1], b[2:], along[1], wide, warps, min(warps, wide) > 1)
        slices = first.lines.shape[1]
        mgpu.warpgroup_barrier()
        for part in range(slices):
            first.ask(part)
            second.ask(part)
            mgpu.utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)
        for part in range(slices):
            mgpu.utils.inline_ptx(f"cp.async.wait_group {slices - 1 - part};", has_side_effects=True)
            mgpu.warpgroup_barrier()
            acc = mma_steps(first.found(part), second.found(part), acc, first.kind, warps)
        return acc

    def run(left_room, right_room):
        operands = ((x[0], room, *x[1]) for x, room in ((left, left_room), (right, right_room)))
        return multiplied(*operands, plgpu.layout_cast(acc, layouts[2]))

    return pl.run_scoped(run, *(plgpu.SMEM((n,), x[0].dtype) for n, x in zip(sizes, (left, right))))
""",
    "accesses": """def element(x, register, k):
    x = x.registers.flat[register] if x.registers.ndim else x.registers.item()
    return vector.extract(x, dynamic_position=[], static_position=[k]) if isinstance(x.type, ir.VectorType) else x


def places(at, index, mask, register, k):
    place = [arith.index_cast(ir.IndexType.get(), element(x, register, k)) for x in at[: len(index)]]
    there = element(at[-1], register, k) if mask is not None else None
    return place, arith.cmpi(arith.CmpIPredicate.ne, there, mgpu.c(0, there.type)) if there is not None else None


def given(index, mask, layout):
    blocks = [*index, *([] if mask is None else [mask])]
    blocks = [plgpu.layout_cast(x, layout) if jnp.ndim(x) else jnp.int32(x) for x in blocks]
    return blocks, [layout if jnp.ndim(x) else plgpu.Layout.WG_SPLAT(()) for x in blocks]


def load(ref, index, layout=None, mask=None, other=0, width=1):
    if layout is None:
        place = index if mask is None else tuple(jnp.where(mask, i, 0) for i in index)
        return ref[place] if mask is None else jnp.where(mask, ref[place], jnp.full((), other, ref.dtype))
    blocks, layouts = given(index, mask, layout)
    shape, held = jnp.broadcast_shapes(*map(jnp.shape, blocks)), layout.to_mgpu()
    made = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts), return_type=made)
    def loaded(context, array, *at):
        dtype = ir.MemRefType(array.type).element_type
        kind, first = ir.VectorType.get((width,), dtype), mgpu.c(0, ir.IndexType.get())

        def part(register, k):
            place, there = places(at, index, mask, register, k)
            place = place if there is None else [arith.select(there, i, first) for i in place]
            found = vector.load(kind, array, place, alignment=width * mgpu.bytewidth(dtype))
            return found if there is None else arith.select(there, found, vector.broadcast(kind, mgpu.c(other, dtype)))

        registers = np.empty(held.registers_shape(shape), dtype=object)
        for r in range(registers.size):
            registers.flat[r] = mgpu.utils.vector_concat([part(r, k) for k in range(0, held.vector_length, width)])
        return mgpu.FragmentedArray(_registers=registers, _layout=held, _is_signed=mgpu.utils.is_signed(ref.dtype))

    return loaded(ref, *blocks)


def store(ref, index, value, layout=None, mask=None, width=1):
    if layout is None:
        @pl.when(True if mask is None else mask)
        def _():
            ref[index] = value

        return
    blocks, layouts = given(index, mask, layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *layouts))
    def stored(context, array, value, *at):
        dtype = ir.MemRefType(array.type).element_type
        for r in range(value.registers.size):
            for k in range(0, value.layout.vector_length, width):
                place, there = places(at, index, mask, r, k)
                part = mgpu.utils.vector_slice(value.registers.flat[r], slice(k, k + width))
                with contextlib.nullcontext() if there is None else mgpu.when(there):
                    vector.store(part, array, place, alignment=width * mgpu.bytewidth(dtype))

    stored(ref, plgpu.layout_cast(value, layout), *blocks)
""",
}
IMPORTS["accesses"] = ("import contextlib", *IMPORTS["accesses"], "from jax.experimental import pallas as pl")
