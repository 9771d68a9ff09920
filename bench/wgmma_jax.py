"""How long products take on Mosaic GPU by wgmma, written by hand, beside both ways that `pallas` has.

    python bench/wgmma_jax.py [--tokens 1,64,…] [--rounds N] [--json FILE]

gate_gemm of 648 columns and 2048 summed elements, bfloat16, in chains of calls as in bench/ways_jax.py. Rows of tokens and of
the weight come by TMA into stages of swizzled shared memory. Eight parts of the summed axis are added up in order: by a second
kernel (`split`), or one after the other in a program (`within`); `turned`: the weight's columns are the matrix unit's rows.
`unlike` is the share of outputs whose bits are not those of mosaic, `relative` the largest distance from float64.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.device_jax import timed
from moekit.backends.loaded import load
from moekit.backends.mosaic_helpers import IMPORTS, MOSAIC
from moekit.jax import gate_gemm

LINKS, PARTS, DEPTH = 6, 8, 64
SWIZZLED = plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH)


@dataclass(frozen=True)
class Block:
    """A program's rows and columns, in how many stages operands come, and how parts are added up."""

    rows: int
    columns: int
    stages: int = 8
    within: bool = False
    turned: bool = False
    groups: int = 1  # warpgroups, which have rows of their own

    def __str__(self) -> str:
        how = ("within" if self.within else "split") + (", turned" if self.turned else "")
        return f"wgmma {self.rows} x {self.columns}, {how}" + (f", {self.groups} warpgroups" if self.groups > 1 else "")


BLOCKS = {
    1: (Block(64, 8, turned=True), Block(64, 32)), 16: (Block(64, 16, turned=True),),
    64: (Block(64, 32), Block(64, 64), Block(64, 64, turned=True)), 128: (Block(64, 64),), 256: (Block(64, 64),),
    1024: (Block(64, 64, 4, True), Block(64, 128, 4, True)),
    4096: (Block(64, 128, 4, True), Block(128, 128, 4, True, groups=2)),
}  # fmt: skip


def accesses() -> dict:
    """What printed kernels load and store with."""
    lines = [*IMPORTS["tiled"], *IMPORTS["accesses"], "import jax.numpy as jnp", "from jax import lax"]
    lines += ["from jax.experimental.pallas import mosaic_gpu as plgpu", MOSAIC["tiled"], MOSAIC["accesses"]]
    text = "\n".join(lines)
    return load("mosaic", "wgmma", text, "by hand")


def meet(threads: int) -> None:
    """All threads of a program wait for each other."""
    plgpu.inline_mgpu()(lambda context: mgpu.utils.inline_ptx(f"bar.sync 9, {threads};", has_side_effects=True) and None)()


def product(x: jax.Array, w: jax.Array, block: Block) -> jax.Array:
    """x [T, K] by w [N, K]: [T, N], or as many sums of parts [P, T, N]; interpreted where there is no GPU."""
    (t, k), (n, _) = x.shape, w.shape
    parts = 1 if block.within else PARTS  # a program's own, of the summed axis
    own, steps = k // parts, k // parts // DEPTH
    stages, rows, columns = min(block.stages, steps), block.rows, block.columns
    tall, wide, mine = -(-t // rows), -(-n // columns), rows // block.groups
    interpret = jax.default_backend() != "gpu"
    whole = (n, t) if block.turned else (t, n)
    out = jax.ShapeDtypeStruct(whole, x.dtype) if block.within else jax.ShapeDtypeStruct((PARTS, *whole), jnp.float32)

    def kernel(x_ref, w_ref, out_ref):
        pid, group = lax.axis_index("program"), lax.axis_index("warpgroup") if block.groups > 1 else 0
        part, at = lax.div(pid, jnp.int32(tall * wide)), lax.rem(pid, jnp.int32(tall * wide))
        t0, n0, k0 = lax.div(at, jnp.int32(wide)) * rows, lax.rem(at, jnp.int32(wide)) * columns, part * own

        def multiplied(x_smem, w_smem, full):
            def ask(step, slot):
                for ref, smem, first, many in ((x_ref, x_smem, t0, rows), (w_ref, w_smem, n0, columns)):
                    source = ref.at[pl.ds(first, many), pl.ds(k0 + step * DEPTH, DEPTH)]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

            def asked(step, slot, wanted=True):
                pl.when(jnp.logical_and(wanted, group == 0))(lambda: ask(step, slot))

            def some(first, many):  # steps from `first` on
                def scoped(acc):
                    for j in range(many):
                        slot, before = j % stages, first + j - 1
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, x_smem.at[slot, pl.ds(group * mine, mine)], w_smem.at[slot].transpose((1, 0)))
                        if stages < steps:
                            plgpu.wgmma_wait(1 if j else 0)
                            if not interpret:
                                meet(128 * block.groups)
                            asked(before + stages, (j - 1) % stages, jnp.logical_and(before >= 0, before + stages < steps))
                    return acc[...]

                return pl.run_scoped(scoped, plgpu.ACC((mine, columns), jnp.float32))

            for slot in range(stages):
                asked(slot, slot)
            if not block.within:
                return stored(out_ref, some(0, steps), part)
            each, none = steps // PARTS, jnp.full((mine, columns), 0.0, jnp.float32)
            none = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
            stored(out_ref, lax.fori_loop(0, PARTS, lambda p, total: total + some(p * each, each), none).astype(x.dtype), None)

        def stored(out_ref, value, part):
            lead, first = () if part is None else (part,), (t0 + group * mine, n0)
            if interpret:
                place = [pl.ds(f, many) for f, many in zip(first, (mine, columns), strict=True)]
                out_ref[(*lead, *place[:: -1 if block.turned else 1])] = value.T if block.turned else value
                return
            layout = plgpu.Layout.WGMMA
            index = [f + plgpu.broadcasted_iota(jnp.int32, (mine, columns), d, layout=layout) for d, f in enumerate(first)]
            mask = jnp.logical_and(index[0] < t, index[1] < n)
            place = (*lead, *index[:: -1 if block.turned else 1])
            accesses()["store"](out_ref, place, value, layout, mask=mask, width=1 if block.turned else 2)

        scratch = {f"{name}_smem": plgpu.SMEM((stages, many, DEPTH), x.dtype, transforms=SWIZZLED)
                   for name, many in (("x", rows), ("w", columns))}  # fmt: skip
        full = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
        pl.run_scoped(multiplied, **scratch, full=full, collective_axes=("warpgroup",) if block.groups > 1 else ())

    threads = {"num_threads": block.groups, "thread_name": "warpgroup"} if block.groups > 1 else {}
    more = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    params = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
    grid = (tall * wide * (1 if block.within else PARTS),)
    return plgpu.kernel(kernel, out_type=out, grid=grid, grid_names=("program",), compiler_params=params, **threads, **more)(
        x, w
    )


def added(partial: jax.Array) -> jax.Array:
    """The second kernel of a split: sums of parts, in order, 256 columns of a row a program."""
    parts, t, n = partial.shape
    if jax.default_backend() != "gpu":
        return sum(partial, jnp.zeros((t, n), jnp.float32)).astype(jnp.bfloat16)
    helpers, wide = accesses(), -(-n // 256)
    layout = helpers["tiled"](warps=(4,), lanes=(32,), vector=(2,))

    def kernel(partial_ref, out_ref):
        pid = lax.axis_index("program")
        row = lax.div(pid, jnp.int32(wide))
        at = lax.rem(pid, jnp.int32(wide)) * 256 + plgpu.broadcasted_iota(jnp.int32, (256,), 0, layout=layout)
        total = plgpu.layout_cast(jnp.full((256,), 0.0, jnp.float32), layout)
        for part in range(parts):
            total = total + helpers["load"](partial_ref, (pid * 0 + part, row, at), layout, mask=at < n, width=2)
        helpers["store"](out_ref, (row, at), total.astype(jnp.bfloat16), layout, mask=at < n, width=2)

    params = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
    out = jax.ShapeDtypeStruct((t, n), jnp.bfloat16)
    return plgpu.kernel(kernel, out_type=out, grid=(t * wide,), grid_names=("program",), compiler_params=params)(partial)


def by_hand(x: jax.Array, w: jax.Array, block: Block) -> jax.Array:
    """x [T, K] by w [N, K]: [T, N]."""
    made = product(w, x, block) if block.turned else product(x, w, block)
    return made if block.within else added(made)


def measure(tokens: int, columns: int, depth: int, rounds: int) -> list[dict]:
    """One row for each side."""
    keys = jax.random.split(jax.random.key(tokens))
    x, w = (jax.random.normal(key, (n, depth)).astype(jnp.bfloat16) for key, n in zip(keys, (tokens, columns), strict=True))
    sets = [(jnp.roll(x, i), jnp.roll(w, i) * depth**-0.5) for i in range(LINKS)]
    ways = {way: partial(gate_gemm, implementation=way) for way in ("pallas-triton", "mosaic")}
    ways |= {str(block): partial(by_hand, block=block) for block in BLOCKS[max(t for t in BLOCKS if t <= tokens)]}
    wanted, bits = (np.asarray(a, np.float64) for a in sets[0]), {}
    wanted = np.matmul(next(wanted), next(wanted).T)

    def chain(way: str):
        def every(sets):
            before, kept = (), []
            for own in sets:
                own, before = lax.optimization_barrier((own, before))
                before = ways[way](*own)
                kept.append(before)
            return kept

        return jax.jit(every)

    def prepare(way: str) -> tuple[dict, object]:
        call = chain(way).lower(sets).compile()
        got = np.asarray(call(sets)[0])
        bits[way] = got.view(np.uint16)
        unlike = np.mean(bits[way] != bits.get("mosaic", bits[way]))
        off = np.max(np.abs(got.astype(np.float64) - wanted) / (1 + np.abs(wanted)))
        return {"unlike": round(float(unlike), 6), "relative": float(f"{off:.2g}")}, lambda: call(sets)

    return runner.beside(ways, prepare, partial(timed, links=LINKS, rounds=rounds))


def cases(args) -> Iterator[runner.Case]:
    """A case per number of tokens."""
    columns, depth = (64, 64 * PARTS) if args.smoke else (648, 2048)
    for tokens in args.tokens:
        yield (
            {"case": f"gate_gemm {columns} x {depth}", "T": tokens, "dtype": "bfloat16"},
            (tokens, columns, depth, args.rounds),
        )


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--tokens 64 --rounds 1",
    options=(runner.Option("tokens", tuple(BLOCKS)), runner.ROUNDS),
    columns=("us", "unlike", "relative"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
