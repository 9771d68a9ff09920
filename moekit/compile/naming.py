"""Names in emitted text: the declaration's own where it has them, unique, and never a word of Python's or Triton's."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence

TEMPORARY = "tmp"
RESERVED = {
    *keyword.kwlist,
    *dir(builtins),
    "tl",
    "triton",
    "pl",
    "plt",
    "jnp",
    "lax",
    "jax",
    "program",
    "self",
    "turn",
    "carry",
    "pid",
    "PDL",
    "gdc_launch_dependents",
    "gdc_wait",
    "prefetch",
    *(f"nan_{kind}" for kind in ("max", "min", "maximum", "minimum")),
    "trunc_div",
    "trunc_rem",
}
ARGUMENT = re.compile(r"^n_|^end_|_ptr$|_ref$|_stride_")  # as other arguments of a kernel are called


def identifier(axis: str) -> str:
    """A Python identifier for an axis: `2*I` → `i2x`, `H` → `h`."""
    text = re.sub(r"(\d+)\*(\w+)", r"\2\1x", axis).replace("+", "_").replace(".", "_").lower()
    return text if text.isidentifier() else f"n{re.sub(r'[^0-9a-z_]', '_', text)}"


def extent_name(axis: str) -> str:
    """The kernel argument that carries the size of a dynamic axis: the axis's name, unless something else is called so."""
    plain = axis.isidentifier() and axis not in RESERVED and not ARGUMENT.search(axis)
    return axis if plain else f"n_{identifier(axis)}"


def arguments_of(axes: Iterable[str], tensors: Mapping[str, Sequence[str | None]]) -> set[str]:
    """Every name that a kernel over these axes, on tensors with these axes, may give to an argument."""
    pointers = {f"{t}{end}" for t in tensors for end in ("_ptr", "_ref", "_out_ref")}
    strides = {f"{t}_stride_{identifier(a)}" for t, dims in tensors.items() for a in dims if a is not None}
    return {extent_name(a) for a in axes} | pointers | strides | {f"{s}_by{n}" for s in strides for n in (2, 4, 8, 16)}


class Names:
    """Hands out each name once."""

    def __init__(self, taken: Iterable[str] = ()):
        self.taken = {*RESERVED, *taken}

    def fresh(self, hint: str) -> str:
        """`hint` itself the first time, then hint_1, hint_2, …; temporaries (`tmp`) are numbered from the start."""
        hint = re.sub(r"_\d+$", "", hint)
        if hint != TEMPORARY and hint not in self.taken:
            self.taken.add(hint)
            return hint
        number = 0 if hint == TEMPORARY else 1
        while f"{hint}_{number}" in self.taken:
            number += 1
        self.taken.add(f"{hint}_{number}")
        return f"{hint}_{number}"
