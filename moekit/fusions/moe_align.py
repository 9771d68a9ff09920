"""Pairs of a token and one of its experts, sorted by expert into blocks of one expert each: what grouped experts go by."""

from typing import NamedTuple

import numpy as np

from moekit.lang import In, Value, cumsum, fusion, iota, max, place, size, slice, sum, where


def reference(ids, experts, block):
    """Expert by expert, each one's pairs in their order."""
    flat = ids.reshape(-1).astype(np.int64)
    blocks = most_blocks(ids.shape[0], ids.shape[1], experts, block)
    pairs, chosen = np.full((blocks, block), -1, np.int32), np.full(blocks, -1, np.int32)
    b = 0
    for e in range(experts):
        own = np.flatnonzero(flat == e)
        for start in range(0, len(own), block):
            part = own[start : start + block]
            pairs[b, : len(part)], chosen[b] = part, e
            b += 1
    return {"pairs": pairs, "chosen": chosen}


def most_blocks(T, K, experts, block):
    """Blocks that T·K pairs can need: the full ones, and one for the rest of each expert."""
    return T * K // block + (0 if block == 1 else min(experts, T * K))


class Tables(NamedTuple):
    """`moe_align`'s pairs [B, J] and chosen [B], and what they are made of: how many pairs each expert has [F], pairs in their
    blocks [B, J], how many a block has [B]."""

    pairs: Value
    chosen: Value
    counts: Value
    order: Value
    filled: Value


def align(ids: Value, block: int) -> Tables:
    """The tables of `moe_align`, for a declaration with the axes T, K, E, B and J."""
    e = slice(iota("E"), "E", 0, size("E"), into="F")  # the experts once more: a program has one of E and looks at all of F
    counts = sum(ids == e, over="K T")
    padded = (counts + (block - 1)) // block * block
    before = iota("B") * block - (cumsum(padded, over="F") - padded)  # places of an expert's that lie before a block
    within = (before >= 0) & (before < padded)
    chosen = max(where(within, e, -1), over="F")
    filled = sum(where(within, counts - before, 0), over="F")

    mine = ids == iota("E")
    start = sum(where(e < iota("E"), padded, 0), over="F")
    slot = where(mine, start + cumsum(mine, over="T K") - 1, -1)
    order = place(iota("T") * size("K") + iota("K"), B=slot // block, J=slot % block)
    return Tables(where(iota("J") < filled, order, -1), chosen, counts, order, filled)


@fusion(
    reference, ids=In("T K", dtype=("int32", "int64")), dynamic="T B",
    axes={"E": lambda experts: experts, "B": most_blocks, "J": lambda block: block},
)  # fmt: skip
def moe_align(ids, experts: int, block: int = 16):
    """Blocks of pairs of one expert each: ids [T, K] -> pairs [B, block] and chosen [B], int32.

    Pair t·K + k stands once among the blocks of expert ids[t, k], in the order of pairs; -1 fills a block up. Blocks are in the
    experts' order; chosen says whose they are, -1 past the last one that is used. B is T·K // block + min(experts, T·K). Ids of
    no expert are in no block.
    """
    tables = align(ids, block)
    return {"pairs": tables.pairs, "chosen": tables.chosen}
