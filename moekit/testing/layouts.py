"""Where a tensor's elements lie, said so that both faces can build it: PyTorch as strides and an offset, JAX as a `View` of a
dense base array; and the kinds of layouts there are, written once against a `Source` of choices.

Every list of choices starts with what is simplest, and every integer is simplest when small.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")

VIEWS = ("dense", "padded", "padded 16", "strided", "transposed", "apart", "transposed padded", "arbitrary")
READ_ONLY = ("row 0", "column 0")  # several elements are one: nothing may be written there
KINDS = (*VIEWS[:5], "shifted", *VIEWS[5:], *READ_ONLY, "far")
BEYOND = 2**31


@dataclass(frozen=True)
class Source:
    """Where choices come from. `integer(low, high)` gives an integer of that range, both ends included; simplest when small."""

    integer: Callable[[int, int], int]

    def choose(self, options: Sequence[T]) -> T:
        """One of the options; simplest when early."""
        return options[self.integer(0, len(options) - 1)]


def numpy_source(*seed: int) -> Source:
    """Choices that follow from a seed, each as likely as any other."""
    rng = np.random.default_rng(seed)
    return Source(lambda low, high: int(rng.integers(low, high + 1)))


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor of rank `len(order)` lie. `order`: dimensions as stored, outermost first.

    Along dimension d the base has `starts[d] + steps[d]·(n-1) + 1 + pads[d]` elements. Dimensions in `zero` have stride 0;
    `shift` moves the whole tensor by that many elements. `kind` is what coverage counts it as.
    """

    kind: str
    order: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    pads: tuple[int, ...]
    zero: tuple[int, ...] = ()
    shift: int = 0

    @classmethod
    def dense(cls, rank: int) -> Layout:
        """Row-major and contiguous."""
        return cls("dense", tuple(range(rank)), (0,) * rank, (1,) * rank, (0,) * rank)

    def base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The base's extent along each dimension of the tensor (1 where the stride is 0)."""
        return tuple(
            1 if d in self.zero else self.starts[d] + (self.steps[d] * (n - 1) + 1 + self.pads[d] if n else 0)
            for d, n in enumerate(shape)
        )

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides in elements, as torch.as_strided has them."""
        base, strides, step = self.base(shape), [0] * len(shape), 1
        for d in reversed(self.order):
            strides[d] = 0 if d in self.zero else step * self.steps[d]
            step *= base[d]
        return tuple(strides)

    def offset(self, shape: tuple[int, ...]) -> int:
        """The first element's place in the base, the shift included."""
        base, offset, step = self.base(shape), self.shift, 1
        for d in reversed(self.order):
            offset += 0 if d in self.zero else self.starts[d] * step
            step *= base[d]
        return offset

    def span(self, shape: tuple[int, ...]) -> int:
        """Elements from the beginning of the base to its end."""
        return self.shift + int(np.prod(self.base(shape), dtype=np.int64))

    def elements(self, base: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in its base, an array with its axes in the order of storage."""
        ends = [start + (step * (n - 1) + 1 if n else 0) for start, step, n in zip(self.starts, self.steps, shape, strict=True)]
        index = tuple(slice(self.starts[d], ends[d], self.steps[d]) for d in self.order)
        return np.transpose(base[(*index, ...)], [self.order.index(d) for d in range(len(shape))])

    def to_json(self) -> dict:
        """Only what differs from a contiguous tensor."""
        plain, mine = vars(Layout.dense(len(self.order))), vars(self)
        return {"kind": self.kind, "rank": len(self.order)} | {
            n: list(v) if isinstance(v, tuple) else v for n, v in mine.items() if v != plain[n]
        }

    @classmethod
    def from_json(cls, data: Mapping) -> Layout:
        """The layout that `to_json` wrote."""
        given = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if n != "rank"}
        return replace(cls.dense(data["rank"]), **given)


def draw_layout(kind: str, shape: tuple[int, ...], itemsize: int, source: Source) -> Layout:
    """A layout of one kind for a shape; "far" needs two elements along some dimension."""
    rank = len(shape)
    if kind == "dense" or rank == 0:
        return Layout.dense(rank)
    odd, numbers = lambda: 2 * source.integer(0, 7) + 1, lambda low, high: tuple(source.integer(low, high) for _ in shape)
    first = lambda value, other=0: (value, *(other,) * (rank - 1))  # noqa: E731
    last = lambda value, other=0: (*(other,) * (rank - 1), value)  # noqa: E731
    backwards, lane = tuple(reversed(range(rank))), 16 // itemsize
    made = {
        "padded": lambda: {"pads": last(odd())},
        "padded 16": lambda: {"pads": last(-shape[-1] % lane + lane * source.integer(1, 4))},
        "strided": lambda: {"steps": last(source.integer(2, 5), 1), "starts": last(source.integer(0, 2))},
        "transposed": lambda: {"order": backwards},
        "shifted": lambda: {"shift": odd()},
        "apart": lambda: {"steps": first(source.integer(2, 7), 1), "starts": first(source.integer(0, 2))},
        "transposed padded": lambda: {"order": backwards, "pads": first(odd())},
        "arbitrary": lambda: {"order": _shuffled(rank, source), "starts": numbers(0, 3), "steps": numbers(1, 3),
                              "pads": numbers(0, 3)},
        "row 0": lambda: {"zero": (0,)},
        "column 0": lambda: {"zero": (rank - 1,)},
        "far": lambda: _far(shape, source),
    }[kind]()  # fmt: skip
    return replace(Layout.dense(rank), kind=kind if made else "dense", **made)


def _shuffled(rank: int, source: Source) -> tuple[int, ...]:
    order = list(range(rank))
    for d in range(rank - 1):
        other = source.integer(d, rank - 1)
        order[d], order[other] = order[other], order[d]
    return tuple(order)


def _far(shape: tuple[int, ...], source: Source) -> dict:
    """The outermost dimension of more than one element so wide apart that offsets pass 2³¹ elements."""
    place = next((d for d, n in enumerate(shape) if n > 1), None)
    if place is None:
        return {}
    inner = int(np.prod(shape[place + 1 :], dtype=np.int64))
    step = -(-(BEYOND + source.integer(0, 1000)) // ((shape[place] - 1) * max(1, inner)))
    return {"steps": tuple(step if d == place else 1 for d in range(len(shape)))}


def lay(kind: str, shape: tuple[int, ...], itemsize: int) -> Layout:
    """One layout of a kind, always the same."""
    return draw_layout(kind, shape, itemsize, numpy_source(zlib.crc32(kind.encode())))
