"""A product on the matrix unit, as `mma.sync` takes it: what of a block each of a program's warps and lanes has."""

from __future__ import annotations

STEP = 16  # rows of one instruction, and elements along which it adds up, of two bytes
COLUMNS = 8  # of one instruction, and groups of a warp's lanes: each has a column, and of rows every eighth
SLICE = 64  # elements along which it adds up that are waited for together where operands come by way of shared memory


def shared(rows: int, columns: int, warps: int) -> tuple[int, int]:
    """How many of a product's warps have other rows, and how many other columns: so that a lane holds the least of both
    operands, for every warp loads its own."""
    found = ((high, warps // high) for high in range(1, warps + 1) if warps % high == 0)
    fitting = [(high, wide) for high, wide in found if rows % (STEP * high) == 0 and columns % (COLUMNS * wide) == 0]
    return min(fitting, key=lambda f: (rows // f[0] + columns // f[1], f[0]), default=(1, warps))
