"""Declarations that nobody has seen, each with a numpy reference: they show that the language is a language."""

from __future__ import annotations

import numpy as np

from moekit import lang as ml
from moekit.lang import In, InOut, Out, fusion, round_to


def _f64(*arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def _plane_norm(x, *, eps):
    (x,) = _f64(x)
    centred = x - x.mean((1, 2), keepdims=True)
    return {"out": centred / np.sqrt((centred * centred).mean((1, 2), keepdims=True) + eps)}


@fusion(_plane_norm, x=In("T C H"))
def plane_norm(x, eps: float = 1e-5):
    """Layer norm over two axes: a reduction that needs the result of another."""
    x32 = ml.f32(x)
    centred = x32 - ml.mean(x32, over="C H")
    return ml.cast(centred * ml.rsqrt(ml.mean(centred * centred, over="C H") + eps), x.dtype)


@fusion(lambda x: {"ids": np.argmin(x, -1).astype(np.int32), "best": np.min(x, -1)}, x=In("T H"))
def nearest(x):
    """Index and value of the first minimum."""
    return {"ids": ml.argmin(x, over="H"), "best": ml.cast(ml.min(x, over="H"), x.dtype)}


def _norm_gemm(x, weight, w, *, eps):
    x, weight, w = _f64(x, weight, w)
    return {"out": round_to(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight, "bfloat16") @ w.T}


@fusion(_norm_gemm, x=In("T D"), weight=In("D"), w=In("P D", dtype="bfloat16"))
def norm_gemm(x, weight, w, eps: float = 1e-6):
    """A product whose left operand is normalised first and rounded to bfloat16."""
    x32 = ml.f32(x)
    normal = x32 * ml.rsqrt(ml.mean(x32 * x32, over="D") + eps) * ml.f32(weight)
    return ml.contract(ml.cast(normal, "bfloat16"), w, over="D")


def _gated_gemm(x, w, bias):
    x, w, bias = _f64(x, w, bias)
    gate, up = np.split(x @ w.T + bias, 2, -1)
    return {"out": gate / (1 + np.exp(-gate)) * up}


@fusion(_gated_gemm, x=In("T D"), w=In("2*I D"), bias=In("2*I"))
def gated_gemm(x, w, bias):
    """A product with an epilogue that joins two halves of its columns."""
    gate, up = ml.halves(ml.contract(x, w, over="D") + ml.f32(bias), "I")
    return ml.cast(ml.silu(gate) * up, x.dtype)


def _mixed(a, b, c, d):
    a, b, c, d = _f64(a, b, c, d)
    total = a[:, None, :] * b[None, :, None] + c[None, None, :] - d[:, :, None]
    return {"out": np.maximum(total, 0.25), "rows": (np.abs(a) + c).max(-1)}


@fusion(_mixed, a=In("T H"), b=In("K"), c=In("H"), d=In("T K"), out=Out("T K H"))
def mixed(a, b, c, d):
    """Broadcasts of four shapes, and outputs of different ranks."""
    a, b, c, d = (ml.f32(v) for v in (a, b, c, d))
    return {"out": ml.maximum(a * b + c - d, 0.25), "rows": ml.max(abs(a) + c, over="H")}


def _running(x, mask):
    return {"out": np.cumsum(x.astype(np.float64) * mask, -1), "places": np.cumsum(mask, -1) - mask}


@fusion(_running, x=In("T E"), mask=In("T E", dtype="int32"))
def running(x, mask):
    """Running sums of floats and of counts: the place of each chosen element among the chosen."""
    return {"out": ml.cumsum(ml.f32(x) * ml.f32(mask), over="E"), "places": ml.cumsum(mask, over="E") - mask}


def _slot_mean(x, slots, state, *, keep):
    state = state.astype(np.float64)
    valid = (slots >= 0) & (slots < len(state))
    old = np.where(valid[:, None], state[np.where(valid, slots, 0)], 0)
    new = old * keep + x.astype(np.float64) * (1 - keep)
    state[slots[valid]] = new[valid]
    return {"state": state, "out": new.sum(-1)}


@fusion(_slot_mean, x=In("T H"), slots=In("T", dtype=("int32", "int64")), state=InOut("S H", dtype="float32"), dynamic="T S")
def slot_mean(x, slots, state, keep: float = 0.75):
    """Rows of a state, chosen by slot, decay towards the input; slots out of range are left alone."""
    new = ml.gather(state, slots, over="S") * keep + ml.f32(x) * (1.0 - keep)
    return {"state": ml.put(new, slots, over="S"), "out": ml.sum(new, over="H")}


def _turned_round(x):
    (x,) = _f64(x)
    return {"x": round_to(x[:, ::-1] + x[:, :1], "float32"), "out": x.sum(-1)}


@fusion(_turned_round, x=InOut("T H", dtype="float32"))
def turned_round(x):
    """A row updated from its other end and its first element: read at other elements than the one written."""
    first = ml.gather(x, ml.extent("H") * 0, over="H")
    return {"x": ml.gather(x, ml.size("H") - 1 - ml.iota("H"), over="H") + first, "out": ml.sum(x, over="H")}


def _slot_window(x, slots, state):
    valid = (slots >= 0) & (slots < len(state))
    windows = np.concatenate([np.where(valid[:, None], state[np.where(valid, slots, 0)], 0), x[:, None]], axis=1)
    state[slots[valid]] = windows[valid, 1:]
    return {"state": state, "out": windows.astype(np.float64).sum(-1)}


@fusion(_slot_window, x=In("T"), slots=In("T", dtype="int32"), state=InOut("S H"), dynamic="T S")
def slot_window(x, slots, state):
    """Rows of a state, chosen by slot, move up by one; slots out of range are left alone."""
    window = ml.concat(ml.gather(state, slots, over="S"), ml.cast(x, state.dtype), over="H 1", into="H+1")
    moved = ml.slice(window, "H+1", 1, ml.size("H"), into="H")
    return {"state": ml.put(moved, slots, over="S"), "out": ml.sum(window, over="H+1")}


def _padded(x, y):
    x, y = _f64(x, y)
    longer = np.pad(x, ((0, 0), (0, y.shape[1] - x.shape[1])))
    joined = np.concatenate([x, 2 * y, np.full((len(x), 1), 7.0), x[:, ::-1]], axis=1)
    return {"out": longer + y, "least": np.maximum(x[:, 1:2], x).sum(-1), "joined": joined, "late": joined[:, 4:-2:3].sum(1)}


@fusion(_padded, x=In("T A"), y=In("T B"))
def padded(x, y):
    """Indices that leave a tensor, an element of an axis beside all of it, and values one after the other."""
    x32, y32 = ml.f32(x), ml.f32(y)
    backwards = ml.gather(x32, ml.size("A") - 1 - ml.iota("A"), over="A")
    joined = ml.concat(x32, y32 * 2, 7.0, backwards, over="A B 1 A", into="J")
    late = ml.slice(joined, "J", 4, (ml.size("J") - 4) // 3, into="L", step=3)
    second = ml.gather(x32, ml.extent("A") * 0 + 1, over="A")
    return {
        "out": ml.gather(x32, ml.iota("B"), over="A") + y32,
        "least": ml.sum(ml.maximum(second, x32), over="A"),
        "joined": joined,
        "late": ml.sum(late, over="L"),
    }


def _columns(x, y):
    x, y = _f64(x, y)
    return {"total": x.sum(0), "product": x.T @ y}


@fusion(_columns, x=In("T H"), y=In("T P"))
def columns(x, y):
    """A sum and a product over the dynamic axis."""
    return {"total": ml.sum(ml.f32(x), over="T"), "product": ml.contract(x, y, over="T")}


@fusion(lambda x: {"low": np.min(x, 0), "where": np.argmax(x, 0).astype(np.int32)}, x=In("T H"))
def column_extremes(x):
    """Minimum, and place of the maximum, along the dynamic axis."""
    return {"low": ml.cast(ml.min(x, over="T"), x.dtype), "where": ml.argmax(x, over="T")}


@fusion(lambda a, b: {"out": np.einsum("bmk,bnk->bmn", *_f64(a, b))}, a=In("B M K"), b=In("B N K"), dynamic="B")
def batched(a, b):
    """A batched product."""
    return ml.contract(a, b, over="K")


def _grouped(x, w, ids):
    x, w = _f64(x, w)
    return {"out": np.einsum("tkd,tkpd->tkp", np.repeat(x[:, None], ids.shape[1], 1), w[ids])}


@fusion(_grouped, x=In("T D"), w=In("E P D"), ids=In("T K", dtype="int32"), out=Out("T K P"))
def grouped(x, w, ids):
    """Each token times the weights of the experts chosen for it: a gather on the weight."""
    return ml.cast(ml.contract(x, ml.gather(w, ids, over="E"), over="D"), x.dtype)


def _double_softmax(x, y):
    x, y = _f64(x, y)
    e = np.exp(x - x.max((1, 2), keepdims=True))
    weights = e / e.sum((1, 2), keepdims=True)
    return {"out": (weights * y).sum((1, 2)), "each": weights.sum(2)}


@fusion(_double_softmax, x=In("T A B"), y=In("T A B"))
def double_softmax(x, y):
    """A softmax over two axes together, then two reductions of it."""
    x32 = ml.f32(x)
    e = ml.exp(x32 - ml.max(x32, over="A B"))
    weights = e / ml.sum(e, over="A B")
    return {"out": ml.sum(weights * ml.f32(y), over="A B"), "each": ml.sum(weights, over="B")}


def _rotate(x, angle):
    x, angle = _f64(x, angle)
    return {"turned": x[:, :8:2] * angle - x[:, 1:8:2] * (1 - angle), "swapped": x[:, :-3:-1] * 2}


@fusion(_rotate, x=In("T D"), angle=In("T R"))
def rotate(x, angle):
    """Interleaved slices with a step, as in a partial rotary embedding, and a gather by computed ids."""
    x32, a = ml.f32(x), ml.f32(angle)
    left, right = (ml.slice(x32, "D", start, 4, "R", step=2) for start in (0, 1))
    last = ml.slice(x32, "D", ml.size("D") - 2, 2, "Q")
    return {"turned": left * a - right * (1.0 - a), "swapped": ml.gather(last, 1 - ml.iota("Q"), over="Q") * 2}


def _waves(x, angle, position):
    x, angle, position = _f64(x, angle, position)
    return {"sine": np.sin(x), "turned": np.cos(angle * position[:, None]) * x}


@fusion(_waves, x=In("T D"), angle=In("D"), position=In("T", dtype="int32"))
def waves(x, angle, position):
    """Sines of operands and cosines of what is computed."""
    turned = ml.cos(ml.f32(angle) * ml.f32(position)) * ml.f32(x)
    return {"sine": ml.sin(x), "turned": ml.cast(turned, x.dtype)}


def _bits(x):
    rounded = round_to(x.astype(np.float64), "bfloat16").astype(np.float32)
    return {"high": (rounded.view(np.int32) >> 16).astype(np.int16), "odd": (np.arange(x.shape[1]) % 3 == 1) & (x > 0)}


@fusion(_bits, x=In("T H", dtype="float32"))
def bits(x):
    """Bit operations, a narrow integer output and a bool one."""
    narrow = ml.cast(x, "bfloat16")
    high = ml.cast(ml.bitcast(ml.f32(narrow), "int32") >> 16, "int16")
    return {"high": high, "odd": (ml.iota("H") % 3 == 1) & (x > 0)}


def _constants(x):
    out, square = x.astype(np.float64) * np.exp(0.5) * 1.25 + 7.5, np.full(len(x), x.shape[1] ** 2.0)
    return {"out": out, "plain": np.full(x.shape, 1.5), "chosen": np.where(x > 0, 1.5, -2.0), "square": square}


@fusion(_constants, x=In("T H"), plain=Out("T H"), square=Out("T"))
def constants(x):
    """Arithmetic on constants, and outputs that are constants."""
    out = ml.f32(x) * (ml.exp(0.5) * 1.25) + ml.cast(2.5, "bfloat16") * 3
    chosen = ml.where(x > 0, ml.cast(1.5, x.dtype), ml.cast(-2, x.dtype))
    square = ml.f32(ml.extent("H") * ml.extent("H"))
    return {"out": ml.cast(out, x.dtype), "plain": ml.cast(1.5, x.dtype), "chosen": chosen, "square": square}


SIZES = {
    plane_norm: {"T": 5, "C": 3, "H": 21},
    nearest: {"T": 5, "H": 37},
    norm_gemm: {"T": 18, "D": 50, "P": 19},
    gated_gemm: {"T": 18, "D": 50, "I": 17},
    mixed: {"T": 5, "H": 19, "K": 3},
    running: {"T": 5, "E": 29},
    slot_mean: {"T": 5, "H": 21, "S": 11},
    turned_round: {"T": 5, "H": 37},
    slot_window: {"T": 5, "S": 11, "H": 6},
    padded: {"T": 5, "A": 9, "B": 13},
    columns: {"T": 37, "H": 21, "P": 18},
    column_extremes: {"T": 37, "H": 21},
    batched: {"B": 3, "M": 18, "N": 20, "K": 35},
    grouped: {"T": 4, "D": 21, "E": 5, "P": 9, "K": 3},
    double_softmax: {"T": 4, "A": 5, "B": 13},
    rotate: {"T": 5, "D": 10, "R": 4},
    waves: {"T": 5, "D": 21},
    bits: {"T": 4, "H": 33},
    constants: {"T": 4, "H": 33},
}
