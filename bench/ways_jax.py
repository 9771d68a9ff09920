"""How long a fusion takes by each of `pallas`'s two ways to a GPU, in whole arrays and in columns of larger ones; their table.

    python bench/ways_jax.py [--fusions NAME,…] [--dtypes bfloat16,…] [--rounds N] [--json FILE] [--table FILE]

`--table` writes what `implementation="pallas"` goes by (moekit/tune/way.py): what is measured, and what else the file had.
Both ways of a row are timed in turn, each as a chain of calls in one jit with operands of their own, by the device's clock, L2
cold (bench/device_jax.py); what a fusion updates is donated. In the end it says where the bits of the first token's outputs are
not the same at every number of tokens.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.device_jax import compiled, made, timed
from moekit import jax as mj
from moekit.files import write_text
from moekit.fusions import FUSIONS
from moekit.jax import view
from moekit.lang.graph import Graph
from moekit.testing.values import shapes_of
from moekit.tune.table import graph_key
from moekit.tune.way import LAYOUTS, MOSAIC, TRITON

LINKS = 8
HOW = f"microseconds of a call, in a chain of {LINKS} in one jit with operands of their own, L2 cold, by the device's clock"
MORE = 64  # columns of the larger arrays
FLOAT32 = ("A_log", "dt_bias", "weights", "share", "q_weight", "k_weight", "frequencies")  # whatever the dtype is
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A fusion at static sizes, and at which numbers of tokens it is measured. `float32`: operands that are always so.
    `printed`: dtypes in which Mosaic GPU has it."""

    fusion: str
    sizes: Mapping[str, int]
    tokens: tuple[int, ...] = (1, 64, 4096)
    params: Mapping[str, Any] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    printed: tuple[str, ...] = ("bfloat16", "float32", "float16")

    def dtypes(self, dtype: str) -> dict[str, str]:
        """The dtype of every operand."""
        tensors = FUSIONS[self.fusion].tensors
        wanted = {n: "float32" if n in (*FLOAT32, *self.float32) else dtype for n in tensors}
        wanted |= dict.fromkeys(("ids", "positions"), "int32")
        return {n: wanted[n] if wanted[n] in x.dtypes else x.dtypes[0] for n, x in tensors.items()}

    def graph(self, dtype: str) -> Graph:
        """What it computes."""
        declared = FUSIONS[self.fusion]
        shapes = shapes_of(declared, {**self.sizes, "T": 1}, self.params)
        return declared.trace(declared.bind(shapes, self.dtypes(dtype), declared.bind_params(self.params)))

    def operands(self, dtype: str, tokens: int) -> Arrays:
        """Random operands on the device; fewer tokens are the first of more."""
        found: Arrays = {}
        for i, (n, shape) in enumerate(
            shapes_of(FUSIONS[self.fusion], {**self.sizes, "T": max(self.tokens)}, self.params).items()
        ):
            key = jax.random.fold_in(jax.random.key(0), i)
            if n == "ids":
                x = jax.random.uniform(key, (shape[0], self.sizes["E"])).argsort(-1)[:, : shape[1]].astype(jnp.int32)
            elif n == "positions":
                x = jnp.arange(shape[0], dtype=jnp.int32) % self.sizes["L"]
            else:
                x = (jax.random.normal(key, shape) * (1 if self.by_token(n) else shape[-1] ** -0.5)).astype(
                    self.dtypes(dtype)[n]
                )
            found[n] = x[:tokens] if self.by_token(n) else x
        return found

    def by_token(self, name: str) -> bool:
        """Whether an operand has a row for each token."""
        return FUSIONS[self.fusion].tensors[name].dims[0].text == "T"

    @property
    def updated(self) -> list[str]:
        """The operands that are updated in place."""
        return [n for n, x in FUSIONS[self.fusion].tensors.items() if x.role == "InOut"]


PRODUCT = ((1, 64), {}, (), ("bfloat16", "float16"))
EXPERTS = {"K": 10, "E": 512, "I": 256, "H": 2048}
CASES = (
    *(Case("add_rms_norm", {"H": h}) for h in (2048, 4096)),
    *(Case("topk_softmax", {"E": e}, params={"k": k}) for e, k in ((512, 10), (256, 8))),
    *(Case("silu_and_mul", {"I": i}) for i in (512, 64, 1024)),
    *(Case("gated_rms_norm", {"V": v, "D": 128}) for v in (32, 4)),
    *(Case("shared_expert_combine", {"H": h, "H?": 1}) for h in (2048, 4096)),
    *(Case("delta_rule_step", {"K": v // 2, "V": v, "Dk": 128, "Dv": 128}, (1, 64, 256), float32=("state",)) for v in (32, 4)),
    *(Case("causal_conv1d_step", {"C": c, "S": 3}, (1, 64, 1024), float32=("weight",)) for c in (8192, 1024)),
    Case("qkv_norm_rope", {"Q": 16, "K": 2, "R": 32, "N": 192, "Dv": 256, "L": 1024}, (1, 64)),
    Case("expert_gate_up", {"K": 10, "E": 512, "I": 256, "D": 2048}, (1, 4, 16)),
    Case("expert_down", EXPERTS, (1, 4, 16)),
    Case("conv_projections", {"C": 4096, "S": 3, "P": 2176, "D": 2048}, (1, 4), float32=("weight",)),
    Case("gate_gemm", {"P": 648, "D": 2048}, *PRODUCT),
    *(Case("gate_projections", {"I": i, "D": 2048, "E": 512, "G": 1}, *PRODUCT) for i in (64, 512)),
    *(Case("down_combine", {"H": 2048, "I": i, "H?": 1}, *PRODUCT) for i in (64, 512)),
)


@dataclass(frozen=True)
class Chain:
    """Calls of a case one after the other, by one way, of operands that lie so."""

    case: Case
    way: str
    layout: str

    def wide(self, name: str, x: Any) -> bool:
        """Whether an operand is columns of a larger array."""
        case = self.case
        return self.layout == "columns" and case.by_token(name) and x.ndim > 1 and name not in (*case.updated, "ids")

    def held(self, given: Arrays) -> Arrays:
        """The arrays that operands lie in."""
        return {n: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, MORE)]) if self.wide(n, x) else x for n, x in given.items()}

    def one(self, held: Arrays) -> tuple:
        """The outputs of one call."""
        given = ((n, held[n]) for n in FUSIONS[self.case.fusion].tensors)  # under jit a dict is in the order of its keys
        operands = [view(x)[..., :-MORE] if self.wide(n, x) else x for n, x in given]
        got = getattr(mj, self.case.fusion)(*operands, **self.case.params, implementation=self.way)
        return got if isinstance(got, tuple) else (got,)

    def every(self, fixed: list[Arrays], state: list[Arrays]) -> tuple[list, list]:
        """The new values of what is updated, and all outputs beside them."""
        names = [w.tensor for w in self.case.graph("bfloat16").writes]
        before, kept, after = (), [], []
        for given, old in zip(fixed, state, strict=True):
            (given, old), before = lax.optimization_barrier(((given, old), before))
            before = self.one({n: (given | old)[n] for n in FUSIONS[self.case.fusion].tensors})
            outs = dict(zip(names, before, strict=True))
            after.append({n: outs.pop(n) for n in old})
            kept.append(outs)
        return after, kept


def measure(case: Case, dtype: str, tokens: int, rounds: int) -> list[dict]:
    """One row for each way and layout."""
    rows = []
    for layout in LAYOUTS:
        chains = {way: Chain(case, way, layout) for way in (TRITON, MOSAIC)}
        given = chains[TRITON].held(case.operands(dtype, tokens))
        sets = [
            {n: jnp.roll(x, i, 0) if x.dtype == jnp.int32 else jnp.roll(x, i) for n, x in given.items()} for i in range(LINKS)
        ]
        fixed = [{n: x for n, x in s.items() if n not in case.updated} for s in sets]
        state = {way: [{n: jnp.copy(s[n]) for n in case.updated} for s in sets] for way in chains}
        lowered = {way: partial(jax.jit(c.every, donate_argnums=1).lower, fixed, state[way]) for way, c in chains.items()}
        programs = compiled(lowered)
        single = compiled({way: partial(jax.jit(c.one).lower, given) for way, c in chains.items()})

        def prepare(way: str) -> tuple[dict, Any]:
            first = b"".join(np.asarray(x[:1]).tobytes() for x in made(single[way])(given))  # noqa: B023
            program = made(programs[way])  # noqa: B023

            def run():
                state[way], kept = program(fixed, state[way])  # noqa: B023
                return kept

            return {"layout": layout, "first": hashlib.sha256(first).hexdigest()[:16]}, run  # noqa: B023

        rows += runner.beside(chains, prepare, partial(timed, links=LINKS, rounds=rounds))
    return [row | {"key": graph_key(case.graph(dtype)), "every": list(case.tokens)} for row in rows]


def cases(args: Any) -> Iterator[runner.Case]:
    """Every fusion, dtype and number of tokens that was asked for."""
    asked = [case for case in CASES if case.fusion.startswith(args.fusions)]
    for case in asked[: 1 if args.smoke else None]:
        for dtype in (d for d in args.dtypes if d in case.printed):
            for tokens in case.tokens[: 1 if args.smoke else None]:
                head = {"fusion": case.fusion, "sizes": " ".join(map(str, case.sizes.values())), "dtype": dtype, "T": tokens}
                yield head, (case, dtype, tokens, args.rounds)


def end(result: dict) -> str:
    """Say where a token's bits hang on how many there are, and write the table: of what was timed both ways at every number of
    tokens of its case, with the same bits."""
    times, firsts, entries = {}, {}, {}
    for row in result["rows"]:
        every = times.setdefault((row["key"], row["layout"], tuple(row["every"])), {TRITON: {}, MOSAIC: {}})
        if "us" in row:
            every[row["side"]][row["T"]] = row["us"]
            firsts.setdefault((row["key"], row["layout"], row["side"]), set()).add(row["first"])
    others = [key for key, found in firsts.items() if len(found) > 1]
    for (key, layout, tokens), by in times.items():
        if all({*found} == {*tokens} for found in by.values()) and not any((key, layout, way) in others for way in by):
            found = {way: [by[way][t] for t in tokens] for way in by}
            entries.setdefault(key, {})[layout] = {"T": list(tokens), **found}
    if path := result.pop("table"):
        known = json.loads(Path(path).read_text(encoding="utf-8"))["entries"] if Path(path).exists() else {}
        said = {"gpu": result["device"], "made with": {n: result["versions"][n] for n in ("jax", "triton")}, "how": HOW}
        write_table(Path(path), said | {"again": f"python bench/ways_jax.py --table {path}"}, known | entries)
    return "\n".join(f"other bits: {' '.join(key)}" for key in others)


def write_table(path: Path, head: dict, entries: dict) -> None:
    """Write a table, a line for each graph and layout."""
    rows = [f"  {json.dumps(key)}: {{\n" + ",\n".join(f"   {json.dumps(n)}: {json.dumps(x)}" for n, x in e.items()) + "\n  }"
            for key, e in sorted(entries.items())]  # fmt: skip
    write_text(path, json.dumps(head, indent=1)[:-2] + ',\n "entries": {\n' + ",\n".join(rows) + "\n }\n}\n")


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--fusions silu_and_mul --dtypes float32",
    options=(
        runner.Option("fusions", ("",), "that begin so"),
        runner.Option("dtypes", ("bfloat16", "float32", "float16")),
        runner.ROUNDS,
        runner.Option("table", "", "the file to write"),
    ),
    patience=180,
    begin=lambda args: {"table": args.table},
    end=end,
    columns=("layout", "us"),
)

if __name__ == "__main__":
    runner.ask(QUESTION)
