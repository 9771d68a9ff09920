"""The questions that bench/ asks, by the name of their file."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if "QUESTION = " in p.read_text(encoding="utf-8"))


def question(name: str):
    """The question of a file."""
    return importlib.import_module(f"bench.{name}").QUESTION
