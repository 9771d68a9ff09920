"""Some chunks of the gated delta rule, one after the other: a head's state stays where it is while tokens go by."""

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import In, InOut, Value, cast, contract, f32, fusion, gather, iota, size

MOST = 16  # chunks of a call, each of which is code of its own


def reference(q, k, solved, attend, v, since, left, asked, fade, state):
    """float64, chunk by chunk and head by head."""
    after, outs = state.astype(np.float64), {}
    heads = np.arange(v.shape[3]) // max(1, v.shape[3] // max(1, q.shape[3]))
    for n in range(q.shape[1]):
        queries, keys, values, on, to, of = (a[:, n].astype(np.float64) for a in (q, k, v, since, left, asked))
        known = np.einsum("tskd,tkde->tske", keys[:, :, heads], after)
        new = np.einsum("tvsr,trve->tsve", solved[:, n].astype(np.float64), values - on[..., None] * known)
        read = np.einsum("tckd,tkde->tcke", queries[:, :, heads], after) * of[..., None]
        outs[f"read{n}"] = read + np.einsum("tvcs,tsve->tcve", attend[:, n].astype(np.float64), new)
        added = np.einsum("tskd,tske->tkde", keys[:, :, heads], new * to[..., None])
        after = after * fade[:, n].astype(np.float64)[..., None, None] + added
    return {**outs, "state": after}


@fusion(
    reference,
    q=In("T N C K Dk"), k=In("T N S K Dk"), solved=In("T N V S R", dtype="float32"), attend=In("T N V C S", dtype="float32"),
    v=In("T N R V Dv"), since=In("T N R V", dtype="float32"), left=In("T N S V", dtype="float32"),
    asked=In("T N C V", dtype="float32"), fade=In("T N V", dtype="float32"), state=InOut("T V Dk Dv", dtype="float32"),
)  # fmt: skip
def delta_rule_chunks(q, k, solved, attend, v, since, left, asked, fade, state):
    """N chunks of C tokens each: new = solved·(v - since·(k·S)), read = asked·(q·S) + attend·new, S = fade·S + kᵀ·(left·new).

    q, k [T, N, C, K, Dk], v [T, N, C, V, Dv]; solved, attend [T, N, V, C, C]; since, left, asked [T, N, C, V], fade [T, N, V];
    S is state [T, V, Dk, Dv], in place; value head h has key head h·K//V. read0, read1 and so on, [T, C, V, Dv] in q's dtype,
    one for each chunk. Products of float32 numbers with q and k are of two parts in their dtype, those of two of three products
    of such parts (an error of about 2⁻¹⁶ in bfloat16); where q is float32, IEEE. `moekit.models.qwen3next` says what solved is.
    """
    counts = {a: size(a) for a in ("C", "S", "R")}
    if len(set(counts.values())) > 1:
        raise ShapeError(f"delta_rule_chunks: the chunks of q, k and v have {list(counts.values())} tokens; they must be as long")
    if size("N") > MOST:
        raise ShapeError(f"delta_rule_chunks: there are {size('N')} chunks; a call takes at most {MOST}")
    if size("V") % size("K"):
        raise ShapeError(f"delta_rule_chunks: v has {size('V')} heads and k has {size('K')}; V must be a multiple of K")
    head, dtype, outs = iota("V") // (size("V") // size("K")), q.dtype, {}
    q, k = gather(q, head, over="K"), gather(k, head, over="K")
    for n in range(size("N")):
        of = {name: gather(a, n, over="N") for name, a in (("q", q), ("k", k), ("v", v), ("solved", solved), ("attend", attend))}
        at = [gather(a, n, over="N") for a in (since, left, asked, fade)]
        held = _parts(state, dtype)
        known = _product(_only(gather(of["k"], iota("R"), over="S")), held, "Dk")
        new = _product(_parts(of["solved"], dtype), _parts(f32(of["v"]) - at[0] * known, dtype), "R")
        read = at[2] * _product(_only(of["q"]), held, "Dk") + _product(_parts(of["attend"], dtype), _parts(new, dtype), "S")
        outs[f"read{n}"] = cast(read, dtype)
        state = state * at[3] + _product(_only(of["k"]), _parts(new * at[1], dtype), "S")
    return {**outs, "state": state}


def _only(x: Value) -> list[Value]:
    return [x]


def _parts(x: Value, dtype: str) -> list[Value]:
    """A float32 value in a narrow dtype, and what that leaves."""
    if dtype == "float32":
        return [x]
    high = cast(x, dtype)
    return [high, cast(x - f32(high), dtype)]


def _product(a: list[Value], b: list[Value], over: str) -> Value:
    """Of what two lists add up to, but for the product of the last of both, where both have two."""
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    total = contract(*pairs[0], over=over)
    for x, y in pairs[1:]:
        total = total + contract(x, y, over=over)
    return total
