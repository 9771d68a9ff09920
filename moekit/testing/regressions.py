"""Cases that once failed: kept as JSON, one file per fusion, and replayed before anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moekit.files import read_json, write_text
from moekit.testing.case import FuzzCase

TEST = """from moekit.testing import FuzzCase, replay


def test_{0}():
    case = FuzzCase.from_json({{
{1}    }})
    assert not replay(case, {2!r})"""


@dataclass(frozen=True)
class Regression:
    """A case, the implementation that got it wrong, and what was said then."""

    case: FuzzCase
    implementation: str
    problems: tuple[str, ...]
    note: str = ""

    def to_json(self) -> dict:
        """As the file has it."""
        return {"implementation": self.implementation, "note": self.note, "problems": list(self.problems),
                "case": self.case.to_json()}  # fmt: skip


def load(path: Path) -> list[Regression]:
    """The cases of a file, or of every JSON file of a directory; raises ValueError or FileError for a file that holds none."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            rows = read_json(file)
            rows = rows if isinstance(rows, list) else [rows]
            for row in rows:
                row = row if "case" in row else {"case": row}
                found.append(Regression(FuzzCase.from_json(row["case"]), row.get("implementation", "interpret"),
                                        tuple(row.get("problems", ())), row.get("note", "")))  # fmt: skip
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} holds no fuzz case: {error}") from None
    return found


def append(directory: Path, regression: Regression) -> Path:
    """Add a case to its fusion's file, once; the file's path."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in regression.case.fusion)
    path = directory / f"{name}.json"
    rows = read_json(path) if path.exists() else []
    if all((r["case"], r["implementation"]) != (regression.to_json()["case"], regression.implementation) for r in rows):
        write_text(path, "[\n" + ",\n".join(json.dumps(r) for r in [*rows, regression.to_json()]) + "\n]\n")
    return path


def pasteable(case: FuzzCase, implementation: str) -> str:
    """A test that runs a case, ready to paste."""
    name = "".join(c if c.isalnum() else "_" for c in f"{case.fusion}_{implementation}")
    return TEST.format(name, "".join(f"        {k!r}: {v!r},\n" for k, v in case.to_json().items()), implementation)
