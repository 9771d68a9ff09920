"""Whether two strided tensors share memory, decided by elements and not by address ranges."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

LIMIT = 100_000


@dataclass(frozen=True)
class Region:
    """The bytes of a tensor: the address of its first element, shape, strides in bytes, bytes per element."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def end(self) -> int:
        """One past the last byte (strides are not negative)."""
        return self.start + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + self.itemsize


def overlap(a: Region, b: Region) -> bool:
    """Whether some byte belongs to both; True also in the (contrived) cases too large to decide."""
    if 0 in a.shape or 0 in b.shape or a.start >= b.end or b.start >= a.end:
        return False
    return _shared(a.start - b.start, (a.shape, a.strides, a.itemsize), (b.shape, b.strides, b.itemsize))


def overlaps_itself(a: Region) -> bool:
    """Whether two different indices reach one byte: true of a broadcast (stride 0) tensor."""
    if 0 in a.shape:
        return False
    reach = a.itemsize - 1
    for stride, n in sorted(zip(a.strides, a.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return _collides(a.shape, a.strides, a.itemsize)
            reach += (n - 1) * stride
    return False


@lru_cache(maxsize=4096)
def _shared(distance: int, a: tuple, b: tuple) -> bool:
    """Whether distance + Σ i·(strides of a) = Σ j·(strides of b) for some indices and bytes within elements."""
    ranges: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for shape, strides, sign in ((*a[:2], 1), (*b[:2], -1)):
        for n, s in zip(shape, strides, strict=True):
            if n > 1 and s:
                ranges[s][0 if sign < 0 else 1] += (n - 1) * sign
    ranges[1][0] -= b[2] - 1
    ranges[1][1] += a[2] - 1
    return _solvable(sorted(ranges.items(), reverse=True), -distance, nonzero=False)


@lru_cache(maxsize=4096)
def _collides(shape: tuple, strides: tuple, itemsize: int) -> bool:
    if any(n > 1 and s == 0 for n, s in zip(shape, strides, strict=True)):
        return True
    ranges: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    doubled = False
    for n, s in zip(shape, strides, strict=True):
        if n > 1:
            doubled |= s in ranges
            ranges[s][0] -= n - 1
            ranges[s][1] += n - 1
    if doubled:
        return True
    ranges[1][0] -= itemsize - 1
    ranges[1][1] += itemsize - 1
    return _solvable(sorted(ranges.items(), reverse=True), 0, nonzero=True)


def _solvable(variables: list[tuple[int, list[int]]], target: int, nonzero: bool) -> bool:
    """Whether Σ k·stride = target with every k in its range; with `nonzero`, some k of a stride > 1 not 0."""
    budget = [LIMIT]
    tails = []
    low = high = step = 0
    for s, (a, b) in reversed(variables):
        low, high, step = low + s * a, high + s * b, gcd(step, s)
        tails.append((low, high, step))
    tails.reverse()

    def search(at: int, rest: int, moved: bool) -> bool:
        if at == len(variables):
            return rest == 0 and (moved or not nonzero)
        budget[0] -= 1
        low, high, step = tails[at]
        if not low <= rest <= high or rest % step:
            return False
        if budget[0] < 0:
            return True
        s, (a, b) = variables[at]
        below, above = tails[at + 1][:2] if at + 1 < len(tails) else (0, 0)
        first, last = max(a, -(-(rest - above) // s)), min(b, (rest - below) // s)
        return any(search(at + 1, rest - k * s, moved or (k != 0 and s > 1)) for k in range(first, last + 1))

    return search(0, target, False)
