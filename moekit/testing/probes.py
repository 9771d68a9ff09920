"""Small declarations that use the corners of the language which moekit's own fusions leave out.

They are what shows a fault in the compiler that no shipped fusion meets: `moekit fuzz` and `moekit mutants` run them
beside the fusions. Each has a numpy reference of its own, like any declaration.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moekit import lang as ml
from moekit.lang import Fusion, In, InOut, Out, fusion, round_to
from moekit.lang.dtypes import is_float


def probe(reference: Callable, **how) -> Callable[[Callable], Fusion]:
    """`fusion`, for a reference to which every float comes in float64."""

    def exact(**given) -> dict[str, np.ndarray]:
        floats = {n: x.astype(np.float64) for n, x in given.items() if isinstance(x, np.ndarray) and is_float(x.dtype.name)}
        return reference(**{**given, **floats})

    return fusion(exact, **how)


# Without products: element by element, sums and scans along rows, slices, looked-up rows, updates.


@probe(
    lambda x, mask: {"total": np.cumsum(x * mask, -1), "place": np.cumsum(mask, -1, dtype=np.int32) - mask},
    x=In("T E"),
    mask=In("T E", dtype="int32"),
)
def probe_running(x, mask):
    """Running sums of floats and of counts."""
    return {"total": ml.cumsum(ml.f32(x) * ml.f32(mask), over="E"), "place": ml.cumsum(mask, over="E") - mask}


def _slots(x, slots, state, *, keep):
    valid = (slots >= 0) & (slots < len(state))
    old = np.where(valid[:, None], state[np.where(valid, slots, 0)] if len(state) else 0.0, 0.0)
    new = old * keep + x
    state[slots[valid]] = new[valid]
    return {"state": state, "out": old - x}


@probe(_slots, x=In("T H"), slots=In("T", dtype=("int32", "int64")), state=InOut("S H", dtype="float32"), dynamic="T S")
def probe_slots(x, slots, state, keep: float = 0.5):
    """Rows of a state, read and written by slot; slots out of range read zero and write nothing."""
    old = ml.gather(state, slots, over="S")
    return {"state": ml.put(old * keep + ml.f32(x), slots, over="S"), "out": old - ml.f32(x)}


def _window(x, angle, state):
    window = np.concatenate([state, x[..., None]], axis=-1)
    return {"state": window[..., 1:], "out": (window * np.cos(angle)).sum(-1), "back": window[..., ::-1]}


@probe(_window, x=In("T H"), angle=In("H S+1"), state=InOut("T H S"), back=Out("T H S+1"))
def probe_window(x, angle, state):
    """Rows that move up by one in place, read at other elements than are written; and values one after the other."""
    window = ml.concat(state, x, over="S 1", into="S+1")
    back = ml.concat(x, ml.gather(state, ml.size("S") - 1 - ml.iota("S"), over="S"), over="1 S", into="S+1")
    moved = ml.slice(window, "S+1", 1, ml.size("S"), into="S")
    out = ml.sum(ml.f32(window) * ml.cos(ml.f32(angle)), over="S+1")
    return {"state": ml.cast(moved, state.dtype), "out": out, "back": ml.f32(back)}


@probe(lambda state: {"state": np.roll(state, 1, -1), "twice": 2 * np.roll(state, 1, -1)}, state=InOut("T S"))
def probe_round(state):
    """Rows that turn round in place, with all outputs along the axis along which they are read elsewhere."""
    before = ml.slice(state, "S", 0, ml.size("S") - 1, into="R")
    moved = ml.concat(ml.gather(state, ml.extent("S") - 1, over="S"), before, over="1 R", into="S")
    return {"state": moved, "twice": ml.f32(moved) * 2}


def _nearest(x):
    return {"low": np.argmin(x, -1).astype(np.int32), "high": np.argmax(x, -1).astype(np.int32), "span": x.max(-1) - x.min(-1)}


@probe(_nearest, x=In("T H"))
def probe_nearest(x):
    """Indices of the first minimum and maximum, and the distance between them."""
    span = ml.f32(ml.max(x, over="H")) - ml.f32(ml.min(x, over="H"))
    return {"low": ml.argmin(x, over="H"), "high": ml.argmax(x, over="H"), "span": span}


def _interleaved(x, y):
    turned = x[..., 0::2] * y - x[..., 1::2]
    return {"turned": turned, "lifted": x[:, -1] + np.arange(x.shape[2])}


@probe(_interleaved, x=In("T A 2*R"), y=In("T A R"))
def probe_interleaved(x, y):
    """Slices with a start and a step, along an inner and a middle axis, and an index used as a number."""
    x32 = ml.f32(x)
    left, right = (ml.slice(x32, "2*R", start, ml.size("R"), "R", step=2) for start in (0, 1))
    last = ml.sum(ml.slice(x32, "A", ml.size("A") - 1, 1, "one"), over="one")
    return {"turned": left * ml.f32(y) - right, "lifted": last + ml.f32(ml.iota("2*R"))}


def _planes(x, y):
    e = np.exp(x - x.max((1, 2), keepdims=True))
    weights = e / e.sum((1, 2), keepdims=True)
    return {"out": (weights * y).sum((1, 2)), "each": np.swapaxes(weights, 1, 2), "least": y.min(2)}


@probe(_planes, x=In("T A B"), y=In("T A B"), each=Out("T B A"))
def probe_planes(x, y):
    """A softmax over two axes together, reductions of it, and an output stored in another order of axes."""
    x32 = ml.f32(x)
    e = ml.exp(x32 - ml.max(x32, over="A B"))
    weights = e / ml.sum(e, over="A B")
    out = ml.sum(weights * ml.f32(y), over="A B")
    return {"out": out, "each": weights, "least": ml.f32(ml.min(y, over="B"))}


def _bits(x, n):
    number = np.where(np.isnan(x), 0, x)  # which NaN an operation gives is the hardware's choice
    high = round_to(number, "bfloat16").astype(np.float32).view(np.int32) >> 16
    odd = (np.arange(x.shape[1]) % 3 == 1) & (x > 0.5)
    return {"high": high.astype(np.int16), "odd": odd, "quotient": np.trunc(n / 3).astype(np.int32) + (n << 2)}


@probe(_bits, x=In("T H", dtype="float32"), n=In("T H", dtype="int32"))
def probe_bits(x, n):
    """Bit operations, integer division, a narrow integer output and a bool one."""
    number = ml.where(ml.isnan(x), 0.0, x)
    high = ml.cast(ml.bitcast(ml.f32(ml.cast(number, "bfloat16")), "int32") >> 16, "int16")
    return {"high": high, "odd": (ml.iota("H") % 3 == 1) & (x > 0.5), "quotient": n // 3 + (n << 2)}


def _rounded(x, y):
    step = round_to(x * 3, "float16")
    return {"out": round_to(step + round_to(y, "bfloat16"), "bfloat16") * 2}


@probe(_rounded, x=In("T H", dtype="float32"), y=In("T H", dtype="float32"))
def probe_rounded(x, y):
    """Three rounding points in a row, to both narrow formats."""
    step = ml.f32(ml.cast(x * 3.0, "float16"))
    return ml.f32(ml.cast(step + ml.f32(ml.cast(y, "bfloat16")), "bfloat16")) * 2.0


@probe(lambda x: {"high": x.max(-1), "low": x.min(-1), "total": x.sum(-1), "mass": np.exp(-np.abs(x)).sum(-1)}, x=In("T H"))
def probe_extremes(x):
    """Reductions of every kind side by side, one of a function that is not zero where nothing was loaded."""
    x32 = ml.f32(x)
    mass = ml.sum(ml.exp(-abs(x32)), over="H")
    return {"high": ml.max(x32, over="H"), "low": ml.min(x32, over="H"), "total": ml.sum(x32, over="H"), "mass": mass}


@probe(lambda x: {"height": np.cumsum(x, 1), "total": x.sum(1)}, x=In("T A H"))
def probe_stacked(x):
    """Running sums along a middle axis, and what they add up to."""
    x32 = ml.f32(x)
    return {"height": ml.cumsum(x32, over="A"), "total": ml.sum(x32, over="A")}


def _residual(x, y):
    coarse, fine = round_to(x, "float16"), round_to(y, "bfloat16")
    return {"lost": x - coarse, "rest": (y - fine) * coarse}


@probe(_residual, x=In("T H", dtype="float32"), y=In("T H", dtype="float32"))
def probe_residual(x, y):
    """What rounding takes away: without it nothing is left, and float16 overflows where float32 does not."""
    coarse, fine = ml.f32(ml.cast(x, "float16")), ml.f32(ml.cast(y, "bfloat16"))
    return {"lost": x - coarse, "rest": (y - fine) * coarse}


def _stored(x, w, scale, ids):
    valid = (ids >= 0) & (ids < len(w))
    rows = w[np.where(valid, ids, 0)] if len(w) else np.zeros((len(ids), w.shape[1]))
    return {"out": x @ w.T * scale, "rows": np.where(valid[:, None], rows, 0)}


@probe(
    _stored, x=In("T D"), w=In("N D", dtype="float8_e4m3fn"), scale=In("N", dtype="float32"), ids=In("T", dtype="int32"),
)  # fmt: skip
def probe_stored(x, w, scale, ids):
    """Weights of one byte each: in a product, scaled by row, and looked up."""
    return {"out": ml.contract(x, w, over="D") * scale, "rows": ml.f32(ml.gather(w, ids, over="N"))}


def _shuffled(x, ids):
    valid = (ids >= 0) & (ids < len(x))
    chosen = x[np.where(valid, ids, 0)] if len(x) else np.zeros((len(ids), *x.shape[1:]), x.dtype)
    return {"out": np.where(valid[:, None], chosen, 0), "turned": x[:, np.arange(x.shape[1]) * 2 % max(1, x.shape[1])]}


@probe(_shuffled, x=In("T H"), ids=In("T", dtype="int32"))
def probe_shuffled(x, ids):
    """Rows and columns in another order: outputs that fit an operand and may not be written over it."""
    return {"out": ml.gather(x, ids, over="T"), "turned": ml.gather(x, ml.iota("H") * 2 % ml.size("H"), over="H")}


@probe(
    lambda x, state: {"state": state * 0.5 + x, "before": state.sum(-1), "peak": state.max((1, 2))},
    x=In("T A H"),
    state=InOut("T A H", dtype="float32"),
)
def probe_apart(x, state):
    """A state that is replaced while its old value goes into a sum and a maximum, over other axes each."""
    return {"state": state * 0.5 + ml.f32(x), "before": ml.sum(state, over="H"), "peak": ml.max(state, over="A H")}


@probe(
    lambda x, state, total: {"state": state * 0.5 + x, "total": total + state.sum(-1), "peak": state.max((1, 2))},
    x=In("T A H"),
    state=InOut("T A H", dtype="float32"),
    total=InOut("T A", dtype="float32"),
)
def probe_states(x, state, total):
    """Two states that are replaced, the old value of one in the new one of the other."""
    return {"state": state * 0.5 + ml.f32(x), "total": total + ml.sum(state, over="H"), "peak": ml.max(state, over="A H")}


@probe(
    lambda left, right: {"left": left + right.sum(-1, keepdims=True), "right": right - left.max(-1, keepdims=True)},
    left=InOut("T A", dtype="float32"),
    right=InOut("T H", dtype="float32"),
)
def probe_exchange(left, right):
    """Two states, each replaced by what the old value of the other says."""
    return {"left": left + ml.sum(right, over="H"), "right": right - ml.max(left, over="A")}


@probe(lambda x: {"out": x - x.mean(1, keepdims=True) - x.mean(2, keepdims=True)}, x=In("T A B"))
def probe_centred(x):
    """What is left of a table without the means of its rows and columns: reductions over two axes that the output has."""
    x32 = ml.f32(x)
    return x32 - ml.mean(x32, over="A") - ml.mean(x32, over="B")


def _looked_up(x, table):
    best = np.argmax(x, -1)
    valid = best < len(table)
    rows = table[np.where(valid, best, 0)] if len(table) else np.zeros((len(x), table.shape[1]), table.dtype)
    return {"out": np.where(valid[:, None], rows, 0.0) + x.max(-1, keepdims=True)}


@probe(_looked_up, x=In("T H"), table=In("E P"))
def probe_looked_up(x, table):
    """The row of a table that the place of the largest element names: a load that waits for a reduction."""
    row = ml.gather(table, ml.argmax(x, over="H"), over="E")
    return ml.f32(row) + ml.f32(ml.max(x, over="H"))


def _tables(ids, x, y):
    rows = [np.where(((ids >= 0) & (ids < len(t)))[:, None], t[np.clip(ids, 0, max(0, len(t) - 1))], 0.0) for t in (x, y)]
    return {"out": rows[0] - rows[1]}


@probe(_tables, ids=In("T", dtype="int32"), x=In("E H"), y=In("G H"))
def probe_tables(ids, x, y):
    """Rows of two tables of other sizes by the same ids."""
    return ml.f32(ml.gather(x, ids, over="E")) - ml.f32(ml.gather(y, ids, over="G"))


ORDERS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)


def _ordered(x, y, n, m):
    by, orders = np.where(m == 0, 3, m), enumerate(ORDERS)
    quotient = np.trunc(n / by).astype(np.int32)
    order = np.asarray(sum((f(n, m) + 2 * f(x, y)) * 4**i for i, f in orders), np.int32)
    return {"order": order, "quotient": quotient, "rest": n - quotient * by,
            "bits": (n ^ m) + (n & m) * 16 - (n | m) * 256 + ~n * 4096,
            "ends": np.maximum(n, -m) * 16 + np.minimum(n, m) - np.abs(m), "moved": (n >> 1) + (m << 3)}  # fmt: skip


@probe(_ordered, x=In("T H"), y=In("H"), n=In("T H", dtype="int32"), m=In("H", dtype="int32"))
def probe_ordered(x, y, n, m):
    """Every comparison, of floats and of integers; division of negative numbers, bits and their shifts."""
    by, order = ml.where(m == 0, 3, m), n * 0
    pairs = (n == m, x == y), (n != m, x != y), (n < m, x < y), (n <= m, x <= y), (n > m, x > y), (n >= m, x >= y)
    for i, (whole, real) in enumerate(pairs):
        order = order + (ml.cast(whole, "int32") + 2 * ml.cast(real, "int32")) * 4**i
    bits = (n ^ m) + (n & m) * 16 - (n | m) * 256 + ~n * 4096
    ends = ml.maximum(n, -m) * 16 + ml.minimum(n, m) - abs(m)
    return {"order": order, "quotient": n // by, "rest": n % by, "bits": bits, "ends": ends, "moved": (n >> 1) + (m << 3)}


def _counted(n):
    return {"most": n.max(-1), "least": n.min(-1), "total": n.sum(-1, dtype=n.dtype), "behind": n.max(-1, keepdims=True) - n}


@probe(_counted, n=In("T H", dtype=("int32", "int64")))
def probe_counted(n):
    """Reductions of integers, whose numbers in 64 bits do not fit 32."""
    most = ml.max(n, over="H")
    return {"most": most, "least": ml.min(n, over="H"), "total": ml.sum(n, over="H"), "behind": most - n}


@probe(lambda x: {"side": np.where(x > 0.5, np.inf, -np.inf), "turned": 1 / (-np.where(x > 0.5, x, 0.0))}, x=In("T H"))
def probe_signs(x):
    """Zeros of both signs, as constants that are equal and not the same, and as what becomes of another zero."""
    return {"side": 1.0 / ml.where(x > 0.5, 0.0, -0.0), "turned": 1.0 / -ml.where(x > 0.5, ml.f32(x), 0.0)}


@probe(
    lambda x, y, state: {"out": x + y, "kept": x, "state": state + y, "was": state},
    x=In("T H", dtype="float32"),
    y=In("T H"),
    state=InOut("T H", dtype="float32"),
)
def probe_kept(x, y, state):
    """Operands that are outputs as they are, behind outputs that may be written over them."""
    return {"out": x + ml.f32(y), "kept": x, "state": state + ml.f32(y), "was": state}


@probe(lambda x: {"out": x - x[:, :1]}, x=In("T H", dtype="float32"))
def probe_first(x):
    """Rows less their first element: the output fits the operand, and all of a row's programs read one element of it."""
    return x - ml.sum(ml.slice(x, "H", 0, 1, "one"), over="one")


# With products, on the matrix unit and beside it.


def _gated(x, w, bias):
    gate, up = np.split(x @ w.T + bias, 2, -1)
    return {"out": np.maximum(gate, 0) * up, "gate": gate}


@probe(_gated, x=In("T D"), w=In("2*I D"), bias=In("2*I"))
def probe_gated(x, w, bias):
    """A product whose epilogue joins two halves of its columns."""
    gate, up = ml.halves(ml.contract(x, w, over="D") + ml.f32(bias), "I")
    return {"out": ml.cast(ml.maximum(gate, 0.0) * up, x.dtype), "gate": gate}


@probe(
    lambda x, y: {"total": x.sum(0), "largest": np.maximum(x, 0).max(0, initial=0.0), "product": x.T @ y},
    x=In("T H"),
    y=In("T P"),
)
def probe_columns(x, y):
    """Reductions and a product over the dynamic axis."""
    x32 = ml.f32(x)
    largest = ml.max(ml.maximum(ml.where(ml.iota("T") >= 0, x32, 0.0), 0.0), over="T")
    return {"total": ml.sum(x32, over="T"), "largest": ml.maximum(largest, 0.0), "product": ml.contract(x, y, over="T")}


def _grouped(x, w, ids):
    valid = (ids >= 0) & (ids < len(w))
    chosen = np.where(valid[..., None, None], w[np.where(valid, ids, 0)], 0)
    return {"out": np.einsum("td,tkpd->tpk", x, chosen)}


@probe(_grouped, x=In("T D"), w=In("E P D"), ids=In("T K", dtype="int32"))
def probe_grouped(x, w, ids):
    """Each token times the weights of the experts chosen for it: a gather on the weight."""
    return ml.contract(x, ml.gather(w, ids, over="E"), over="D")


@probe(lambda bias, x, w: {"out": (x + 1) @ (w + 2).T + bias}, bias=In("T P"), x=In("T H"), w=In("P H"))
def probe_product(bias, x, w):
    """A product of two computed operands: past the end both are other than zero, and one is held with its columns outermost."""
    return ml.contract(ml.f32(x) + 1.0, ml.f32(w) + 2.0, over="H") + ml.f32(bias)


@probe(lambda x, w: {"out": x.T @ w}, x=In("D T"), w=In("D P"))
def probe_turned(x, w):
    """A product of operands that both hold the contracted axis outermost."""
    return ml.contract(x, w, over="D")


@probe(lambda x, w: {"out": np.swapaxes(x @ w.T, 0, 1)}, x=In("T D"), w=In("P D"), out=Out("P T"))
def probe_crossed(x, w):
    """A product whose rows come from its second operand, stored with its columns outermost."""
    return ml.contract(w, x, over="D")


@probe(lambda x, w: {"out": (1 / np.sqrt(np.abs(x))) @ (1 / np.sqrt(np.abs(w))).T}, x=In("T D"), w=In("P D"))
def probe_inverse(x, w):
    """A product of operands that both are infinite where nothing was loaded."""
    return ml.contract(ml.rsqrt(abs(ml.f32(x))), ml.rsqrt(abs(ml.f32(w))), over="D")


def _braided(bias, w, v, x):
    even, odd, first, last = (x @ u.T for u in (w[0::2], w[1::2], w[: len(w) // 2], v[len(v) // 2 :]))
    return {"out": even - 2 * odd + bias, "apart": first - 2 * last, "mass": (x * x).sum(-1)}


@probe(_braided, bias=In("I"), w=In("2*I D"), v=In("2*I D"), x=In("T D"), out=Out("T I"),
        apart=Out("T I"))  # fmt: skip
def probe_braided(bias, w, v, x):
    """Products with every second column of one weight, and with the halves of two, held with their columns outermost; beside
    them a sum of the rows."""
    n = ml.size("I")
    even = ml.contract(x, ml.slice(w, "2*I", 0, n, "I", step=2), over="D")
    first = ml.contract(x, ml.slice(w, "2*I", 0, n, "I"), over="D")
    odd = ml.contract(x, ml.slice(w, "2*I", 1, n, "I", step=2), over="D")
    last = ml.contract(x, ml.slice(v, "2*I", n, n, "I"), over="D")
    mass = ml.sum(ml.f32(x) * ml.f32(x), over="D")
    return {"out": even - 2.0 * odd + ml.f32(bias), "apart": first - 2.0 * last, "mass": mass}


@probe(lambda x, w: {"out": x @ w.T / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1)}, x=In("T D"), w=In("P D"))
def probe_scaled(x, w):
    """A product and, beside it, the norm of the rows that go into it."""
    x32 = ml.f32(x)
    return ml.contract(x, w, over="D") * ml.rsqrt(ml.mean(x32 * x32, over="D") + 1.0)


PROBES = {f.name: f for f in list(globals().values()) if isinstance(f, Fusion)}
