"""Some chunks of the gated delta rule, one after the other: a head's state stays where it is while tokens go by."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import In, InOut, Out, Value, cast, contract, f32, fusion, gather, halves, in_turns, iota, round_to, size

MOST = 256  # tokens in a chunk: a program holds a whole chunk's products


def reference(q, k, solved, attend, v, since, left, asked, fade, state):
    """float64, chunk by chunk; factors that are cut in two are rounded as the declaration says."""
    kind, after, read = q.dtype, state.astype(np.float64), np.zeros((*q.shape[:3], *v.shape[3:]))
    heads = np.arange(v.shape[3]) // max(1, v.shape[3] // max(1, q.shape[3]))
    wide = (a.astype(np.float64) for a in (q[..., heads, :], k[..., heads, :], solved, attend, v, since, left, asked, fade))
    chunks = zip(*(np.moveaxis(a, 1, 0) for a in wide), strict=True)
    for n, (queries, keys, solving, attending, new, on, to, of, kept) in enumerate(chunks):
        held, solving, attending = _rounded(after, kind), *(np.split(a, 2, axis=2) for a in (solving, attending))
        known = _summed("tskd,tkde->tske", [keys], held)
        new = _summed("tvsr,trve->tsve", solving, _rounded(new - on[..., None] * known, kind))
        asks = _summed("tckd,tkde->tcke", [queries], held) * of[..., None]
        read[:, n] = asks + _summed("tvcs,tsve->tcve", attending, _rounded(new, kind))
        after = after * kept[..., None, None] + _summed("tskd,tske->tkde", [keys], _rounded(new * to[..., None], kind))
    return {"read": read, "state": after}


def _rounded(x, dtype):
    if dtype == np.float32:
        return [x]
    high = round_to(x, dtype)
    return [high, round_to(x - high, dtype)]


def _summed(subscripts, a, b):
    return sum(np.einsum(subscripts, x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2)


@fusion(
    reference,
    q=In("T M Cq K Dk"), k=In("T M Ck K Dk"), solved=In("T M V 2*Ck Cv"), attend=In("T M V 2*Cq Ck"), v=In("T M Cv V Dv"),
    since=In("T M Cv V", dtype="float32"), left=In("T M Ck V", dtype="float32"),
    asked=In("T M Cq V", dtype="float32"), fade=In("T M V", dtype="float32"), state=InOut("T V Dk Dv", dtype="float32"),
    read=Out("T M Cq V Dv"),
)  # fmt: skip
def delta_rule_chunks(q, k, solved, attend, v, since, left, asked, fade, state):
    """M chunks of C tokens each: new = solved·(v - since·(k·S)), read = asked·(q·S) + attend·new, S = fade·S + kᵀ·(left·new).

    q, k [T, M, C, K, Dk], v [T, M, C, V, Dv]; solved, attend [T, M, V, 2C, C]; since, left, asked [T, M, C, V], fade [T, M, V];
    S is state [T, V, Dk, Dv], in place; value head h has key head h·K//V. read [T, M, C, V, Dv] in q's dtype. Where that is
    narrow, S and what becomes of v are cut into two parts of it, as solved and attend are by who calls: their first C rows and
    their last are to be added up. Of products of two such factors that of the last parts is left out: 2⁻¹⁶ in bfloat16.
    With solved = (1 + L)⁻¹·β, L the part of β·k·kᵀ·decay below the diagonal, attend = q·kᵀ·decay, and since, left, asked, fade
    the decays from the chunk's begin, to its end, from its begin, and over it, it is the gated delta rule: Yang, Kautz and
    Hatamizadeh, Gated Delta Networks (2024), section 3.3.
    """
    counts = {a: size(a) for a in ("Cq", "Ck", "Cv")}
    if len(set(counts.values())) > 1:
        raise ShapeError(
            f"delta_rule_chunks: the chunks of q, k and v have {list(counts.values())} tokens; they must be as long"
        )
    if size("Ck") > MOST:
        raise ShapeError(f"delta_rule_chunks: chunks have {size('Ck')} tokens; a call takes at most {MOST}")
    if not size("K"):
        raise ShapeError("delta_rule_chunks: k has no heads; a call takes 1 or more")
    if size("V") % size("K"):
        raise ShapeError(f"delta_rule_chunks: v has {size('V')} heads and k has {size('K')}; V must be a multiple of K")
    head = iota("V") // (size("V") // size("K"))
    q, k = gather(q, head, over="K"), gather(k, head, over="K")
    read, state = in_turns(partial(_chunk, q, k, solved, attend, v, since, left, asked, fade), state, over="M")
    return {"read": read, "state": state}


def _chunk(q, k, solved, attend, v, since, left, asked, fade, state):
    """What a chunk reads, and the state after it."""
    dtype = q.dtype
    held, again = _parts(state, dtype), gather(k, iota("Cv"), over="Ck")  # k along both axes of a product with it
    rest = f32(v) - since * _product([again], held, "Dk")
    new = _product(halves(solved, "Ck"), _parts(rest, dtype), "Cv")
    read = asked * _product([q], held, "Dk") + _product(halves(attend, "Cq"), _parts(new, dtype), "Ck")
    return cast(read, dtype), state * fade + _product([k], _parts(new * left, dtype), "Ck")


def _parts(x: Value, dtype: str) -> list[Value]:
    """A float32 value in a narrow dtype, and what that leaves."""
    if dtype == "float32":
        return [x]
    high = cast(x, dtype)
    return [high, cast(x - f32(high), dtype)]


def _product(a: Sequence[Value], b: Sequence[Value], over: str) -> Value:
    """Of what two lists add up to, but for the product of the last of both, where both have two."""
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    total = contract(*pairs[0], over=over)
    for x, y in pairs[1:]:
        total = total + contract(x, y, over=over)
    return total
