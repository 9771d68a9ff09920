"""Names in emitted text: the declaration's own where it has them, unique, and never a word of Python's or Triton's."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

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
}


def identifier(axis: str) -> str:
    """A Python identifier for an axis: `2*I` → `i2x`, `H` → `h`."""
    text = re.sub(r"(\d+)\*(\w+)", r"\2\1x", axis).replace("+", "_").replace(".", "_").lower()
    return text if text.isidentifier() else f"n{re.sub(r'[^0-9a-z_]', '_', text)}"


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
