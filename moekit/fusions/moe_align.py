"""Pairs of a token and one of its experts, sorted by expert into blocks of one expert each: what grouped experts go by."""

from typing import NamedTuple

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import In, Value, cast, cumsum, extent, fusion, gather, iota, max, place, size, slice, sum, where

CHUNK = 256  # pairs that are counted together, and in which each is compared with those before it


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


def most_blocks(T, K, F, block):
    """Blocks that T·K pairs can need: the full ones, and one for the rest of each expert."""
    return T * K // pairs_in_block(block) + (0 if block == 1 else min(F, T * K))


def chunks(T, K):
    """Chunks of T·K pairs."""
    return -(-T * K // CHUNK)


def tables_axes(experts):
    """The axes of `align` besides T and K, for a declaration's `axes`; `experts` is the rule of how many there are.

    Chunks C and their pairs P stand once more as G and Q, as every program that orders some looks at others.
    """
    chunk = {"G": chunks, "Q": lambda: CHUNK, "F": experts, "C": chunks, "P": lambda: CHUNK}
    return {**chunk, "B": most_blocks, "J": pairs_in_block}


def pairs_in_block(block):
    """Pairs of a block."""
    if block < 1:
        raise ShapeError(f"block = {block}; blocks have 1 pair or more")
    return block


def counted_experts(experts):
    """Experts that ids may name."""
    if experts < 1:
        raise ShapeError(f"experts = {experts}; there must be 1 or more")
    return experts


class Tables(NamedTuple):
    """`moe_align`'s pairs [B, J] and chosen [B], and what they are made of.

    That is how many pairs of each expert a chunk has [G, F], all have [F], and those before a chunk [C, F]; how many before a
    pair its chunk has of its expert [C, P]; pairs in their blocks [B, J], and how many a block has [B].
    """

    pairs: Value
    chosen: Value
    counted: Value
    rank: Value
    counts: Value
    before: Value
    order: Value
    filled: Value


def align(ids: Value, block: int) -> Tables:
    """The tables of `moe_align`, for a declaration with the axes T, K and `tables_axes`.

    A pair's place is where its expert's begin, and then how many of these there are in the chunks before, and in its own before
    it.
    """

    def listed(chunk: str, element: str) -> tuple[Value, Value]:
        """Numbers of pairs, and their experts; -1 where there is none."""
        number = iota(chunk) * size(element) + iota(element)
        token = number // size("K")
        found = gather(gather(ids, token, over="T"), number % size("K"), over="K")
        inside = (token < extent("T")) & (found >= 0) & (found < size("F"))
        return number, cast(where(inside, found, -1), "int32")

    e = iota("F")
    counted = sum(listed("G", "Q")[1] == e, over="Q")
    counts = sum(counted, over="G")
    before = sum(counted, over="G", upto=iota("C"))
    padded = (counts + (block - 1)) // block * block
    begins = cumsum(padded, over="F") - padded

    number, expert = listed("C", "P")
    other, earlier = (slice(x, "P", 0, size("P"), into="Q") for x in (expert, iota("P")))
    rank = sum((other == expert) & (earlier < iota("P")), over="Q")
    first = sum(where(expert == e, begins + before, 0), over="F")
    slot = where(expert < 0, -1, first + rank)
    order = place(number, B=slot // block, J=slot % block)

    behind = iota("B") * block - begins  # places of an expert's that lie before a block
    within = (behind >= 0) & (behind < padded)
    chosen = max(where(within, e, -1), over="F")
    filled = sum(where(within, counts - behind, 0), over="F")
    return Tables(where(iota("J") < filled, order, -1), chosen, counted, rank, counts, before, order, filled)


@fusion(
    reference, ids=In("T K", dtype=("int32", "int64")), dynamic="T B C G", axes=tables_axes(counted_experts),
)  # fmt: skip
def moe_align(ids, experts: int, block: int = 16):
    """Blocks of pairs of one expert each: ids [T, K] -> pairs [B, block] and chosen [B], int32.

    Pair t·K + k stands once among the blocks of expert ids[t, k], in the order of pairs; -1 fills a block up. Blocks are in the
    experts' order; chosen says whose they are, -1 past the last one that is used. B is T·K // block + min(experts, T·K). Ids of
    no expert are in no block.
    """
    tables = align(ids, block)
    return {"pairs": tables.pairs, "chosen": tables.chosen}
