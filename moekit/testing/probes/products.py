"""Probes with products, on the matrix unit and beside it."""

from __future__ import annotations

import numpy as np

from moekit import lang as ml
from moekit.lang import In, Out
from moekit.testing.probes.exact import probe


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
    x=In("T H"), y=In("T P"),
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
