"""How a rule says that a program breaks it."""

from __future__ import annotations

from typing import NoReturn

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts
from moekit.errors import VerifyError


def fail(f: Facts, rule: str, op: t.Op | None, hint: str) -> NoReturn:
    """Raise VerifyError naming the program, the rule, the operation and what to do."""
    at = f" in `{t.text_of((op,), 0)[0]}`" if op is not None else ""
    raise VerifyError(f"{f.program.name}: {rule}: {hint}{at}")
