"""What becomes of a failing case: it is made small, printed as a test to paste, and kept as JSON, one file per fusion.

It is made small step by step (fewer and smaller axes, contiguous layouts, plain values, the heuristic's schedule); a step is
kept if the case still fails. Cases that Hypothesis draws it makes small itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekit.errors import MoekitError
from moekit.files import read_json, write_text
from moekit.testing.batch import replay
from moekit.testing.case import FuzzCase
from moekit.testing.executors import starved
from moekit.testing.layouts import KINDS
from moekit.testing.processes import PATIENCE, Process, Trouble

RECIPES = ("integers", "normal", "ties", "mixed")  # plainest first
TEST = """from moekit.testing import FuzzCase, replay


def test_{0}():
    case = FuzzCase.from_json({{
{1}    }})
    assert not replay(case, {2!r})"""


def problems(process: Process, case: FuzzCase, implementation: str, patience: float = PATIENCE) -> list[str]:
    """What is wrong with a case; that the process died of it, or did not end, is."""
    answer = process.ask(replay, case, implementation, patience=patience)
    return [answer.text] if isinstance(answer, Trouble) else answer


def fails(process: Process, case: FuzzCase, implementation: str, like: Sequence[str]) -> bool:
    """Whether the case fails, or ends the process it runs in, as another did: running out of memory is neither, and an
    error raised (a refusal, say) is not the wrong values that were found.
    """
    found = problems(process, case, implementation)
    return bool(found) and not starved(Exception(found[0])) and sort_of(found) == sort_of(like)


def sort_of(problems: Sequence[str]) -> str:
    """What sort of failure it is, so that none is taken for another: an error's type, or the fusion's name for wrong values."""
    first = problems[0] if problems else ""
    return "process" if first.startswith(("it ", "its ")) else first.partition(":")[0]


def shrink(case: FuzzCase, fails: Callable[[FuzzCase], bool], most: int = 300, seconds: float = 1e9) -> FuzzCase:
    """The smallest case found that still fails, after at most `most` tries and about `seconds`."""
    until, tries, steps = time.monotonic() + seconds, 0, simpler(case)
    while (candidate := next(steps, None)) is not None and tries < most and time.monotonic() < until:
        tries += 1
        if _valid(candidate) and fails(candidate):
            case, steps = candidate, simpler(candidate)
    return case


def simpler(case: FuzzCase) -> Iterator[FuzzCase]:
    """Cases a step simpler than `case`, boldest first."""
    if case.layouts:
        yield replace(case, layouts={})
    for name in case.layouts:
        yield replace(case, layouts={n: v for n, v in case.layouts.items() if n != name})
    for axis, n in case.sizes.items():
        for smaller in dict.fromkeys((1, n // 4, n // 2, n - n // 8, n - 1)):
            if 0 < smaller < n:
                yield _resized(case, {**case.sizes, axis: smaller})
    if case.schedule != "heuristic":
        yield replace(case, schedule="heuristic")
    for recipe in RECIPES[: RECIPES.index(case.recipe) if case.recipe in RECIPES else None]:
        yield replace(case, recipe=recipe)
    if narrow := [n for n, d in case.dtypes.items() if d in ("float16", "bfloat16")]:
        yield replace(case, dtypes={**case.dtypes, **dict.fromkeys(narrow, "float32")})
    for name, p in case.declaration.params.items():
        if p.default is not p.empty and case.params.get(name) != p.default:
            yield replace(case, params={n: v for n, v in case.params.items() if n != name})
        elif isinstance(given := case.params.get(name), int) and given > 1:
            yield replace(case, params={**case.params, name: 1})
    for name in case.layouts:
        layout = case.layout(name)
        for kind in KINDS[1 : KINDS.index(layout.kind) + 1]:
            if (plainer := case.laid(name, kind)) != layout:
                yield replace(case, layouts={**case.layouts, name: plainer})
    if case.seed:
        yield replace(case, seed=0)


def _resized(case: FuzzCase, sizes: dict[str, int]) -> FuzzCase:
    """The case at other sizes; a far layout is laid out anew, so that it stays far."""
    found = replace(case, sizes=sizes)
    far = [n for n in case.layouts if case.layout(n).kind == "far"] if _valid(found) else []
    return replace(found, layouts={**case.layouts, **{n: found.laid(n, "far") for n in far}})


def _valid(case: FuzzCase) -> bool:
    try:
        return case.problem() is None and bool(case.memory())
    except (MoekitError, KeyError, ValueError):
        return False


@dataclass(frozen=True)
class Failure:
    """A case, the implementation that got it wrong, and what was said then. `fatal`: its process did not live through it."""

    case: FuzzCase
    implementation: str
    problems: tuple[str, ...]
    note: str = ""
    fatal: bool = False

    def to_json(self) -> dict:
        """As the file has it."""
        return {"implementation": self.implementation, "note": self.note, "problems": list(self.problems),
                "case": self.case.to_json()}  # fmt: skip


def load(path: Path) -> list[Failure]:
    """The cases of a file, or of every JSON file of a directory; raises ValueError or FileError for a file that holds none."""
    found = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            rows = read_json(file)
            for row in rows if isinstance(rows, list) else [rows]:
                case = FuzzCase.from_json(row.get("case", row))
                said = tuple(row.get("problems", ()))
                found.append(Failure(case, row.get("implementation", "interpret"), said, row.get("note", "")))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} holds no fuzz case: {error}") from None
    return found


def append(directory: Path, failure: Failure) -> Path:
    """Add a case to its fusion's file, once; the file's path."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in failure.case.fusion)
    path, new = directory / f"{name}.json", failure.to_json()
    rows = read_json(path) if path.exists() else []
    if all((r["case"], r["implementation"]) != (new["case"], new["implementation"]) for r in rows):
        write_text(path, "[\n" + ",\n".join(json.dumps(r) for r in [*rows, new]) + "\n]\n")
    return path


def pasteable(case: FuzzCase, implementation: str) -> str:
    """A test that runs a case, ready to paste."""
    name = "".join(c if c.isalnum() else "_" for c in f"{case.fusion}_{implementation}")
    return TEST.format(name, "".join(f"        {k!r}: {v!r},\n" for k, v in case.to_json().items()), implementation)
