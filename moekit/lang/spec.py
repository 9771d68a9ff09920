"""What a declaration says of its tensors: `In("T 2*I")`, `InOut("T H")`, `Out("T P")`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moekit.errors import DeclarationError
from moekit.lang.dtypes import ALL, FLOATS

_TERM = re.compile(r"^(?:(\d+)\*)?([A-Za-z_]\w*)$|^(\d+)$")


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: a linear form over axis names, `2*I+E+1`; `?` marks one that may be 1."""

    text: str
    terms: tuple[tuple[int, str], ...]
    constant: int = 0
    optional: bool = False

    @classmethod
    def parse(cls, text: str) -> Dim:
        """Read one word of a shape specification."""
        optional, body = text.endswith("?"), text.rstrip("?")
        terms, constant = [], 0
        for part in body.split("+"):
            found = _TERM.match(part)
            if not found:
                raise DeclarationError(f"cannot read dimension {text!r}: write NAME, INT*NAME or sums of them")
            if found[3]:
                constant += int(found[3])
            else:
                terms.append((int(found[1] or 1), found[2]))
        return cls(body, tuple(terms), constant, optional)

    @property
    def axis(self) -> str:
        """The name of the axis this dimension runs along: the text itself."""
        return self.text

    @property
    def plain(self) -> bool:
        """Whether the dimension is a single axis name."""
        return len(self.terms) == 1 and self.terms[0][0] == 1 and not self.constant

    def size(self, sizes: dict[str, int]) -> int:
        """The extent, given the sizes of the axes it is made of."""
        return self.constant + sum(factor * sizes[name] for factor, name in self.terms)


@dataclass(frozen=True)
class Spec:
    """A tensor of a declaration: its dimensions, what it is used for and which dtypes it may have."""

    shape: str
    role: str
    dtypes: tuple[str, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The dimensions, outermost first."""
        return tuple(Dim.parse(word) for word in self.shape.split())

    def __str__(self) -> str:
        return f'{self.role}("{self.shape}")'


def _dtypes(dtype: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (dtype,) if isinstance(dtype, str) else tuple(dtype)
    for name in names:
        if name not in ALL:
            raise DeclarationError(f"{name!r} is no dtype of the language; it has {', '.join(ALL)}")
    return names


def In(shape: str, dtype: str | tuple[str, ...] = FLOATS) -> Spec:
    """An operand that is only read. `dtype`: the dtypes it may have (any float if not said)."""
    return Spec(shape, "In", _dtypes(dtype))


def InOut(shape: str, dtype: str | tuple[str, ...] = FLOATS) -> Spec:
    """An operand that is updated: in place in PyTorch, functionally in JAX."""
    return Spec(shape, "InOut", _dtypes(dtype))


def Out(shape: str) -> Spec:
    """The order of an output's axes, where it is not the order in which the operands name them."""
    return Spec(shape, "Out", ALL)
