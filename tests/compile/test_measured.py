"""The figures that earned the rules: each names what it earned, and how to measure it again."""

import importlib
import json
import re
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = json.loads((resources.files("moekit.compile.rules") / "measured.json").read_text(encoding="utf-8"))["rules"]


def test_every_figure_belongs_to_a_rule_that_is_there():
    """A constant that goes takes its figures along."""
    for name, row in RULES.items():
        for constant in row["constants"]:
            module, _, attribute = constant.partition(".")
            assert hasattr(importlib.import_module(f"moekit.compile.rules.{module}"), attribute), (name, constant)
        assert row["figures"], name


@pytest.mark.parametrize("name", RULES)
def test_every_command_starts(name):
    """The bench takes the arguments, and has cases of all the fusions that they name, if it is told fusions."""
    python, script, *arguments = RULES[name]["again"].split()
    question = importlib.import_module(script.removesuffix(".py").replace("/", ".")).QUESTION
    assert python == "python"
    given = question.arguments(arguments)
    said = str(list(question.cases(given)))
    assert all(fusion in said for fusion in getattr(given, "fusions", ()))


def test_no_figure_of_a_gpu_stands_in_the_code():
    """Times, and the name of the one GPU, are data; what a target has is its row."""
    for path in [*(ROOT / "moekit/compile/rules").glob("*.py"), *(ROOT / "moekit/compile/schedule").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert path.name == "targets.py" or not re.search(r"H200|\d\s?(µs|us)\b|Measured on", text), path.name
