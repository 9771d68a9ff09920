"""A campaign against a package with a fault in it: does the same command find it, and after how many cases?"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from moekit.errors import MoekitError


@contextlib.contextmanager
def planted(mutants: Sequence[str], patches: Sequence[Path] = ()) -> Iterator[Path]:
    """While this lasts, processes that are started find a copy of the package with these mutants and patches in it.

    Yields the copy's folder. This process keeps the package that it has. Raises MoekitError for a mutant that is not in the
    table, and for a change that does not apply.
    """
    from moekit.testing.mutants.score import apply_patch, copy_package, mutate
    from moekit.testing.mutants.table import TABLE

    known = {m.name: m for m in TABLE}
    if unknown := [n for n in mutants if n not in known]:
        raise MoekitError(f"there is no mutant {unknown[0]!r}; see `moekit mutants --list`")
    with tempfile.TemporaryDirectory(prefix="moekit-planted-") as name:
        folder = Path(name)
        package = copy_package(folder)
        for n in mutants:
            mutate(known[n], package)
        for patch in patches:
            apply_patch(patch, folder)
        sys.path.insert(0, name)
        try:
            yield folder
        finally:
            sys.path.remove(name)
